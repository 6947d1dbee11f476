"use strict";
// All about the token that is looked at: its experts in one layer, and its way through all.

{
  /** Everything about one token: each expert's probability, weight and rank, and its way. */
  X.Inspector = class {
    constructor({ onpick, onlayer }) {
      this.onpick = onpick;
      this.onlayer = onlayer;
      this.box = X.el("aside", { class: "inspector", "aria-label": "The token that is looked at" });
    }

    show(card, trace, i, place) {
      if (!trace.tokens.length) return this.box.replaceChildren(X.note("No token yet."));
      const layer = trace.layers[place];
      this.box.replaceChildren(
        this.head(trace, i),
        this.more(),
        ...(layer
          ? [
              this.table(card, layer, i),
              this.remark(card, layer, i),
              this.way(card, trace, i, place),
            ]
          : [X.note("A dense layer: one way for every token.")]),
      );
    }

    head(trace, i) {
      const surprise = inWords(trace.nats?.[i]);
      return X.el(
        "div",
        { class: "head" },
        X.el("span", { class: "quoted" }, X.visible(trace.tokens[i], { blanks: true })),
        X.el("span", { class: "dim" }, `token ${i + 1} of ${trace.tokens.length}${surprise}`),
      );
    }

    /** On a narrow screen the rest unfolds; a wide one shows it at once, and no button. */
    more() {
      const button = X.el("button", {
        type: "button",
        class: "plain more",
        onclick: () => says(this.box.classList.toggle("open")),
      });
      const says = (open) => {
        button.textContent = open ? "less ▾" : "more ▴";
        button.setAttribute("aria-expanded", String(open));
      };
      says(this.box.classList.contains("open"));
      return button;
    }

    table(card, layer, i) {
      const ranked = rank(layer, i);
      const shown = ranked.length > 12 ? Math.max(8, layer.chosen[i].length + 2) : ranked.length;
      const rest = ranked.slice(shown).reduce((sum, row) => sum + row.p, 0);
      const rows = ranked.slice(0, shown).map((row) => this.row(row, layer, i));
      if (card.n_shared) rows.unshift(shared(card));
      if (rest)
        rows.push(
          X.el(
            "tr",
            { class: "dim" },
            X.el("td", { colspan: 2 }, ""),
            X.el(
              "td",
              { colspan: 2 },
              `${ranked.length - shown} others share ${X.percent(rest, 1)}`,
            ),
          ),
        );
      const heads = ["rank", "expert", "probability", "weight"].map((h) =>
        X.el("th", { scope: "col" }, h),
      );
      return X.el(
        "table",
        { class: "ranks" },
        X.el("caption", {}, `Layer ${layer.layer}`),
        X.el("thead", {}, X.el("tr", {}, heads)),
        X.el("tbody", {}, rows),
      );
    }

    row({ e, p, place }, layer, i) {
      const k = layer.chosen[i].indexOf(e);
      const full = layer.dropped?.[i].includes(e);
      const weight = k < 0 ? "" : `${layer.weights[i][k].toFixed(3)}${full ? " ✕" : ""}`;
      return X.el(
        "tr",
        { class: k >= 0 ? "chosen" : "", "data-expert": e },
        X.el("td", { class: "rank" }, `${place}`),
        X.el(
          "td",
          {},
          X.el(
            "button",
            {
              type: "button",
              class: "plain",
              onclick: () => this.onpick(e),
              "aria-label": `Expert ${e}${k >= 0 ? ", chosen" : ""}; show its favourite tokens`,
            },
            X.swatch(e),
            `${e}`,
            k >= 0 ? X.el("span", { class: "dot", "aria-hidden": "true" }, "●") : null,
          ),
        ),
        X.el(
          "td",
          { class: "measure" },
          X.el("i", { style: { width: `${(100 * p).toFixed(1)}%`, background: X.colour(e) } }),
          X.el("span", {}, X.percent(p, 1)),
        ),
        X.el("td", { class: "number" }, weight),
      );
    }

    remark(card, layer, i) {
      const chosen = layer.chosen[i];
      const ranks = rank(layer, i);
      const lifted = chosen.some((e) => ranks.findIndex((row) => row.e === e) >= chosen.length);
      const words = [];
      if (layer.dropped?.[i].length)
        words.push(
          `In training, expert ${layer.dropped[i].join(" and ")} would be full before this token ` +
            `(capacity factor ${card.capacity_factor}), and the token would go by. Here nothing ` +
            "is dropped.",
        );
      const causes = [
        layer.bias
          ? "the balancing bias, which is added before the choice and not to the weight"
          : "",
        card.n_groups > 1 ? "the limit to a few groups of experts" : "",
      ].filter(Boolean);
      if (lifted && causes.length)
        words.push(`A likelier expert is passed over: by ${causes.join(", or by ")}.`);
      if (card.routing === "hash")
        words.push("A fixed hash of the token decides; nothing is learned.");
      if (!card.causal) words.push("Here experts choose tokens, from later ones, too.");
      return words.length ? X.note(words.join(" "), "remark") : "";
    }

    /** The token's way through all layers. */
    way(card, trace, i, place) {
      const n = card.n_experts;
      const side = card.n_shared ? 30 : 0;
      const width = 320;
      const left = 22 + side;
      const gap = 44;
      const x = (e) => left + ((width - left - 6) * (e + 0.5)) / n;
      const r = Math.max(2.5, Math.min(9, (width - left - 6) / n / 2 - 1.5));
      const rows = Array.from({ length: card.n_layers }, (_, number) =>
        trace.layers.findIndex((layer) => layer.layer === number),
      );
      const y = (row) => 16 + row * gap;
      const picture = X.svg("svg", {
        class: "way",
        viewBox: `0 0 ${width} ${y(rows.length - 1) + 22}`,
        role: "img",
        "aria-label": wayInWords(trace, i),
      });
      picture.append(...links(trace, i, rows, x, y));
      rows.forEach((at, row) =>
        picture.append(
          ...this.stop(card, trace.layers[at], i, row, { x, y, r, n, place, at, width }),
        ),
      );
      return X.el("figure", {}, X.el("figcaption", {}, "Its way through the layers"), picture);
    }

    stop(card, layer, i, row, { x, y, r, n, place, at, width }) {
      const here = at === place;
      const parts = [X.svg("text", { x: 0, y: y(row) + 4, class: here ? "now" : "" }, String(row))];
      if (!layer) {
        parts.push(
          X.svg("rect", {
            x: x(0) - r,
            y: y(row) - 5,
            width: width - x(0),
            height: 10,
            rx: 5,
            class: "dense",
          }),
          X.svg(
            "text",
            { x: x((n - 1) / 2), y: y(row) + 3.5, class: "tiny" },
            "dense: one way for all",
          ),
        );
        return parts;
      }
      for (let s = 0; s < Math.min(card.n_shared, 2); s += 1)
        parts.push(
          X.svg("rect", {
            x: 18 + 13 * s,
            y: y(row) - 5.5,
            width: 11,
            height: 11,
            class: "shared",
          }),
          X.svg("text", { x: 23.5 + 13 * s, y: y(row) + 3.5, class: "tiny inside" }, "S"),
        );
      for (let e = 0; e < n; e += 1) parts.push(this.station(layer, i, e, row, { x, y, r, n }));
      parts.push(
        X.svg(
          "rect",
          {
            x: 0,
            y: y(row) - 20,
            width,
            height: 40,
            class: here ? "row now" : "row",
            onclick: () => this.onlayer(at),
          },
          X.svg("title", {}, `Layer ${row}`),
        ),
      );
      return parts;
    }

    station(layer, i, e, row, { x, y, r, n }) {
      const k = layer.chosen[i].indexOf(e);
      const size = k < 0 ? r * 0.62 : r;
      const circle = X.svg("circle", {
        cx: x(e),
        cy: y(row),
        r: size,
        class: k < 0 ? "idle" : "taken",
        style: k < 0 ? {} : { fill: X.colour(e) },
      });
      if (k < 0 || (n > 16 && k > 1)) return circle;
      const place = n > 16 ? { x: x(e), y: y(row) + r + 9 } : { x: x(e), y: y(row) + 3.5 };
      return X.svg(
        "g",
        {},
        circle,
        X.svg("text", { ...place, class: n > 16 ? "tiny" : "tiny inside" }, String(e)),
      );
    }
  };

  /** How likely the token was, after those before it. */
  function inWords(nats) {
    if (nats === undefined || nats === null) return "";
    const p = X.percent(Math.exp(-nats), nats > 4.6 ? 2 : 0);
    return ` · probability ${p}, ${(nats / Math.LN2).toFixed(1)} bits`;
  }

  /** Experts by probability; of equal ones the chosen first. */
  function rank(layer, i) {
    const order = layer.chosen[i];
    const late = (e) => (order.includes(e) ? order.indexOf(e) : order.length + e);
    return layer.probs[i]
      .map((p, e) => ({ e, p }))
      .sort((a, b) => b.p - a.p || late(a.e) - late(b.e))
      .map((row, place) => ({ ...row, place: place + 1 }));
  }

  function shared(card) {
    const several = card.n_shared > 1 ? `×${card.n_shared}` : "";
    return X.el(
      "tr",
      { class: "chosen" },
      X.el("td", { class: "rank" }, "–"),
      X.el(
        "td",
        {},
        X.el("i", { class: "swatch square", "aria-hidden": "true" }),
        `S${several}`,
        X.el("span", { class: "dot", "aria-hidden": "true" }, "●"),
      ),
      X.el("td", { class: "dim" }, "shared, every token"),
      X.el("td", { class: "number" }, card.shared_gate ? "a gate’s" : "1.000"),
    );
  }

  const LINKED = 3; // experts of a layer between which lines are drawn: with more, nobody sees any

  /** Lines between the first experts of one layer and of the next, as wide as their weights. */
  function links(trace, i, rows, x, y) {
    const found = [];
    for (let row = 1; row < rows.length; row += 1) {
      const [above, below] = [trace.layers[rows[row - 1]], trace.layers[rows[row]]];
      if (!above || !below) continue;
      above.chosen[i].slice(0, LINKED).forEach((a, j) =>
        below.chosen[i].slice(0, LINKED).forEach((b, k) => {
          const weight = Math.min(1, above.weights[i][j]) * Math.min(1, below.weights[i][k]);
          const [from, to] = [y(row - 1), y(row)];
          found.push(
            X.svg("path", {
              class: "link",
              d: `M${x(a)},${from} C${x(a)},${to - 18} ${x(b)},${from + 18} ${x(b)},${to}`,
              "stroke-width": (0.6 + 5 * weight).toFixed(2),
            }),
          );
        }),
      );
    }
    return found;
  }

  function wayInWords(trace, i) {
    return trace.layers
      .map((layer) => `layer ${layer.layer}: expert ${layer.chosen[i].join(" and ") || "none"}`)
      .join("; ");
  }
}
