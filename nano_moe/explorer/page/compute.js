"use strict";
// Panel 2: what is stored and what a token meets, to scale: the run, its dense twins, other models.

X.panels.compute = (() => {
  const { el, svg, short, bytes, percent } = X;
  let run, found, k, parts;
  let precision = "fp32";

  async function show(number, body) {
    run = number;
    const loaded = await X.load(`runs/${run}/compute`);
    if (run !== number) return;
    found = loaded;
    k = found.run.top_k;
    parts = {
      words: el("p", { class: "say", "aria-live": "polite" }),
      weights: el("div"),
      rows: el("div"),
    };
    const { n_experts } = found.run;
    const pick =
      n_experts > 1
        ? X.slider({
            label: "Experts per token",
            min: 1,
            max: n_experts,
            value: k,
            says: (value) =>
              `${value} of ${n_experts}${value === found.run.top_k ? ", as trained" : ""}`,
            oninput: (value) => {
              k = value;
              draw();
            },
          })
        : null;
    const bits = X.choice(
      "Bytes per weight",
      Object.keys(found.bytes).map((name) => [name, name]),
      precision,
      (value) => {
        precision = value;
        draw();
      },
    );
    body.replaceChildren(
      el("div", { class: "row" }, pick, bits),
      parts.words,
      el(
        "figure",
        {},
        el("figcaption", {}, "All weights of this run, area by area"),
        parts.weights,
        legend(),
      ),
      parts.rows,
    );
    draw();
  }

  function legend() {
    const token = X.state.token
      ? ` “${X.visible(X.state.token.trace.tokens[X.state.token.i]).trim()}”`
      : "";
    parts.legend = el("p", { class: "dim" });
    parts.legend.textContent = found.run.n_experts
      ? `Filled: met by the token${token}. Outlined: held for other tokens.`
      : "Filled: met by every token, for this run is dense.";
    return parts.legend;
  }

  function draw() {
    if (!parts) return;
    const models = [found.run, ...found.twins].map((model) => at(model, k));
    parts.words.textContent = inWords(models[0], models[2]);
    X.fitted(parts.weights, weights);
    parts.rows.replaceChildren(
      row(found.twins.length ? "This run and dense models of the same making" : "This run", models),
      ...(found.published.length
        ? [row("Published models, among themselves to scale", found.published)]
        : []),
    );
  }

  /** A model with `k` experts per token instead of as many as this run has. */
  function at(model, chosen) {
    const more = chosen - found.run.top_k;
    const moved = { ...model, top_k: model.n_experts ? chosen : 0 };
    for (const name of ["total", "active", "flops"]) moved[name] += more * model.more[name];
    return moved;
  }

  function inWords(own, total) {
    const size = `${bytes(own.total * found.bytes[precision])} in ${precision}`;
    const flops = short(own.flops);
    if (!total)
      return `Dense: every token meets all ${short(own.total)} weights, ${size}, at ${flops}FLOP.`;
    const [met, all] = [short(own.active), short(own.total)];
    const less = (total.flops / own.flops).toFixed(1);
    return (
      `A token meets ${met} of ${all} weights (${percent(own.active / own.total)}), at ` +
      `${flops}FLOP: ${less} times less compute than a dense model as large would take. ` +
      `Memory is not saved: all ${size} must be held.`
    );
  }

  // --- the weights, one rectangle each ---------------------------------------------------------

  function weights(width) {
    const label = width < 500 ? 0 : 64;
    const wide = width - label - 1;
    const height = Math.min(360, 60 + 52 * found.bands.length);
    const picture = svg("svg", {
      class: "weights",
      viewBox: `0 0 ${width} ${height + 2}`,
      role: "img",
      "aria-label": `${short(found.run.total)} weights, filled those that a token meets`,
    });
    let y = 1;
    for (const band of found.bands) {
      const sum = band.parts.reduce((all, part) => all + part.params, 0);
      const tall = (height * sum) / found.run.total;
      let x = label;
      for (const part of band.parts) {
        const across = (wide * part.params) / sum;
        picture.append(...block(part, band, { x, y, across, tall }));
        x += across;
      }
      if (label)
        picture.append(
          svg("text", { x: 0, y: y + tall / 2 + 4 }, band.layer === null ? "tables" : band.name),
        );
      y += tall;
    }
    return picture;
  }

  function block(part, band, { x, y, across, tall }) {
    if (!part.experts) {
      const text = words(part, band, across);
      const named = across > 8 * text.length && tall > 14;
      return [
        svg(
          "rect",
          { x, y, width: across, height: tall, class: `part ${part.kind}` },
          svg("title", {}, `${part.kind.replace("_", " ")}: ${short(part.params)} weights`),
        ),
        named ? svg("text", { x: x + 6, y: y + tall / 2 + 4, class: "on" }, text) : null,
      ];
    }
    const met = chosen(band.layer);
    const one = across / part.experts;
    const found = [];
    for (let e = 0; e < part.experts; e += 1) {
      found.push(
        svg(
          "rect",
          {
            x: x + e * one,
            y,
            width: one,
            height: tall,
            class: met.has(e) ? "part met" : "part idle",
            "data-expert": e,
            style: met.has(e) ? { fill: X.colour(e) } : {},
          },
          svg(
            "title",
            {},
            `expert ${e} of layer ${band.layer}: ${short(part.params / part.experts)} weights` +
              `${met.has(e) ? ", met by the token" : ""}`,
          ),
        ),
      );
      if (one > 15 && tall > 14)
        found.push(
          svg(
            "text",
            { x: x + (e + 0.5) * one, y: y + tall / 2 + 4, class: met.has(e) ? "mid on" : "mid" },
            String(e),
          ),
        );
    }
    return found;
  }

  function words(part, band, across) {
    const name =
      part.kind === "embedding" || part.kind === "head" ? band.name : part.kind.replace("_", " ");
    return across > 230 ? `${name}, ${short(part.params)}` : name.split(" ")[0];
  }

  /** Experts of a layer that the current token would meet with `k` of them. */
  function chosen(layer) {
    const { token } = X.state;
    const held = token?.trace.layers.find((one) => one.layer === layer);
    if (!held) return new Set(Array.from({ length: k }, (_, e) => e));
    const own = held.chosen[token.i];
    const rest = held.probs[token.i]
      .map((p, e) => [p, e])
      .filter(([, e]) => !own.includes(e))
      .sort((a, b) => b[0] - a[0])
      .map(([, e]) => e);
    return new Set([...own, ...rest].slice(0, k));
  }

  // --- models side by side ---------------------------------------------------------------------

  function row(title, models) {
    const strip = el("div", { class: "strip" });
    X.fitted(strip, (width) => squares(models, Math.max(width, 84 * models.length)));
    return el(
      "figure",
      {},
      el("figcaption", {}, title),
      el("div", { class: "scroll" }, strip, table(models)),
    );
  }

  /** A square per model, its area the weights that are stored; filled, those that a token meets. */
  function squares(models, width) {
    const sides = models.map((model) => Math.sqrt(model.total));
    const least = 84;
    const gap = 14;
    const room = (scale) =>
      sides.reduce((all, side) => all + Math.max(least, side * scale) + gap, 0);
    let scale = 190 / Math.max(...sides);
    while (room(scale) > width && scale * Math.max(...sides) > 60) scale *= 0.97;
    const tall = scale * Math.max(...sides);
    return el(
      "div",
      { class: "squares" },
      models.map((model, i) => {
        const side = (n) => `${(scale * Math.sqrt(n)).toFixed(1)}px`;
        return el(
          "div",
          { class: model.rumour ? "rumour" : "", style: { "min-width": `${least}px` } },
          el(
            "div",
            {
              class: "square",
              style: { height: `${tall}px`, width: `${(scale * sides[i]).toFixed(1)}px` },
            },
            el("i", {
              class: "held",
              style: { width: side(model.total), height: side(model.total) },
            }),
            el("i", {
              class: "used",
              style: { width: side(model.active), height: side(model.active) },
            }),
          ),
          el("h4", {}, model.name),
        );
      }),
    );
  }

  const HEADS = [
    "",
    "stored",
    "a token meets",
    "FLOPs per token",
    "to hold it",
    "a token reads",
    "",
  ];

  function table(models) {
    const flops = Math.max(...models.map((model) => model.flops));
    const each = found.bytes[precision];
    const rows = models.map((model) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, model.name, model.rumour ? el("em", {}, " rumour") : null),
        el("td", {}, short(model.total)),
        el(
          "td",
          {},
          short(model.active),
          el(
            "small",
            {},
            ` ${percent(model.active / model.total, model.active < 0.01 * model.total ? 1 : 0)}`,
          ),
        ),
        el(
          "td",
          { class: "flops" },
          el("span", {}, short(model.flops)),
          el(
            "span",
            { class: "track", "aria-hidden": "true" },
            el("i", { style: { width: `${((100 * model.flops) / flops).toFixed(2)}%` } }),
          ),
        ),
        el("td", {}, bytes(model.total * each)),
        el("td", {}, bytes(model.active * each)),
        el("td", { class: "dim source" }, model.note),
      ),
    );
    return el(
      "table",
      { class: "figures models" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          HEADS.map((h) => el("th", { scope: "col" }, h)),
        ),
      ),
      el("tbody", {}, rows),
    );
  }

  let drawing;
  X.on("token", () => {
    cancelAnimationFrame(drawing);
    drawing = requestAnimationFrame(() => {
      if (!parts || !found || X.state.run !== run) return;
      X.fitted(parts.weights, weights);
      parts.legend.replaceWith(legend());
    });
  });

  return { show };
})();

/** Draw into a box at its width, and again whenever that changes. */
X.fitted = (box, draw) => {
  box.draw = () => {
    const width = Math.floor(box.clientWidth);
    box.drawn = width;
    if (width) box.replaceChildren(draw(width));
  };
  if (!box.watched) {
    box.watched = new ResizeObserver(() => {
      if (box.drawn !== Math.floor(box.clientWidth)) box.draw();
    });
    box.watched.observe(box);
  }
  box.draw();
};
