"use strict";
// Panel 3: how the load spread over the experts as training went on, runs side by side.

X.panels.balance = (() => {
  const { el, svg, percent, card } = X;
  const DASHES = ["", "6 4", "2 3", "9 3 2 3"];
  let runs, steps, now, parts, playing;

  async function show(_, body) {
    stop();
    const sparse = X.overview.runs
      .map((one, run) => ({ one, run }))
      .filter(({ one }) => one.layers.length);
    if (!sparse.length)
      return body.replaceChildren(
        X.note("No run here has experts, so there is nothing to balance."),
      );
    const asked = sparse.map(({ one, run }) =>
      X.load(`runs/${run}/balance`)
        .then((balance) => ({ ...one, run, balance }))
        .catch((fault) => ({ ...one, run, fault })),
    );
    const all = await Promise.all(asked);
    runs = all.filter((one) => one.balance);
    const faults = all
      .filter((one) => one.fault)
      .map((one) => X.note(`${one.name}: ${one.fault.message}`, "fault"));
    if (!runs.length) return body.replaceChildren(...faults);
    steps = [...new Set(runs.flatMap((one) => one.balance.steps))].sort((a, b) => a - b);
    now = steps.length - 1;
    body.replaceChildren(
      controls(),
      ...faults,
      cards(),
      lines(),
      el("div", { class: "scroll" }, parts.table),
    );
    update();
  }

  function controls() {
    parts = { cards: [], cursors: [], table: el("table", { class: "figures" }) };
    parts.slider = X.slider({
      label: "Step",
      min: 0,
      max: steps.length - 1,
      value: now,
      says: (i) =>
        `${X.whole(steps[i])}, after ${X.short(steps[i] * runs[0].balance.tokens_per_step)} tokens`,
      oninput: (i) => {
        stop();
        go(i);
      },
    });
    parts.play = el(
      "button",
      { type: "button", onclick: () => (playing ? stop() : play()) },
      "▶ Play",
    );
    return el("div", { class: "row" }, parts.play, parts.slider);
  }

  function play() {
    if (now === steps.length - 1) go(0);
    parts.play.textContent = "❚❚ Pause";
    playing = setInterval(
      () => (now < steps.length - 1 ? go(now + 1) : stop()),
      Math.min(140, Math.max(25, 6000 / steps.length)),
    );
  }

  function stop() {
    clearInterval(playing);
    playing = undefined;
    if (parts) parts.play.textContent = "▶ Play";
  }

  function go(i) {
    now = i;
    parts.slider.set(i);
    update();
  }

  /** The place of the last logged step that is not after the current one; -1 before the first. */
  const place = (balance) => balance.steps.findLastIndex((step) => step <= steps[now]);

  // --- loads -----------------------------------------------------------------------------------

  function cards() {
    const top = Math.max(
      ...runs.flatMap((one) => one.balance.layers.map((layer) => Math.max(...layer.max_vio) + 1)),
    );
    return el(
      "div",
      { class: "balances" },
      runs.map((one) => {
        const layers = one.balance.layers.map((layer) => layerRow(one, layer, top));
        return el(
          "article",
          { class: "balance" },
          el("h3", {}, one.name),
          el("p", { class: "dim" }, one.balancing),
          layers,
        );
      }),
      X.note(
        "Left: the load at this step; the dashed line is an even share, ○ a starved expert " +
          "(below a tenth of it), ✕ a dead one. Right: the shares of all experts over the " +
          "steps, expert 0 at the bottom.",
        "dim wide",
      ),
    );
  }

  function layerRow(one, layer, top) {
    const bars = el("div", { class: "loads" });
    const flow = el("div", { class: "flow" });
    parts.cards.push({ one, layer, bars: loadBars(bars, layer, top) });
    X.fitted(flow, (width) => stream(one, layer, width));
    return el("div", { class: "layer" }, el("h4", {}, `layer ${layer.layer}`), bars, flow);
  }

  /** A bar per expert, in even shares; `top` of them are the full height. */
  function loadBars(box, layer, top) {
    const n = layer.load[0].length;
    const named = (e) => (n > 16 || (n > 9 && e % 2) ? "" : String(e));
    const columns = Array.from({ length: n }, (_, e) => ({
      fill: el("i", { style: { background: X.colour(e) } }),
      mark: el("b", {}, named(e)),
    }));
    box.append(
      el(
        "div",
        { class: n > 16 ? "plot many" : "plot", role: "img" },
        columns.map(({ fill, mark }) =>
          el("span", {}, el("span", { class: "column" }, fill), mark),
        ),
        el("u", { style: { bottom: `calc(14px + 66px / ${top})` }, title: "an even share" }),
      ),
    );
    return (load) => {
      columns.forEach(({ fill, mark }, e) => {
        fill.style.setProperty("height", `${((100 * load[e] * n) / top).toFixed(1)}%`);
        const sign = load[e] === 0 ? "✕" : load[e] < 0.1 / n ? "○" : "";
        mark.textContent = sign || named(e);
        mark.classList.toggle("bad", Boolean(sign));
      });
      box.firstChild.setAttribute(
        "aria-label",
        load.map((share, e) => `expert ${e} ${percent(share, 1)}`).join(", "),
      );
    };
  }

  /** Shares of all experts over the steps, stacked: even bands are a balanced layer. */
  function stream(one, layer, width) {
    const height = 66;
    const at = (s) => across(one.balance.steps[s], width);
    const picture = svg("svg", {
      class: layer.load[0].length > 16 ? "stream many" : "stream",
      viewBox: `0 0 ${width} ${height}`,
      "aria-hidden": "true",
    });
    const low = layer.load.map(() => 0);
    for (let e = 0; e < layer.load[0].length; e += 1) {
      const edge = low.map((y, s) => y + layer.load[s][e]);
      const up = edge.map((y, s) => `${at(s).toFixed(1)},${(height * (1 - y)).toFixed(1)}`);
      const down = low
        .map((y, s) => `${at(s).toFixed(1)},${(height * (1 - y)).toFixed(1)}`)
        .reverse();
      picture.append(
        svg(
          "path",
          { d: `M${up.join("L")}L${down.join("L")}Z`, style: { fill: X.colour(e) }, class: "band" },
          svg("title", {}, `expert ${e}`),
        ),
      );
      low.splice(0, low.length, ...edge);
    }
    return withCursor(picture, width, height);
  }

  const across = (step, width) => {
    const first = steps[0];
    const last = steps.at(-1);
    return last === first ? width / 2 : 1 + ((width - 2) * (step - first)) / (last - first);
  };

  /** The current step as a line, to be moved by pointing; the plot begins `left` of the picture. */
  function withCursor(picture, width, height, left = 0) {
    const cursor = svg("line", { class: "cursor", y1: 0, y2: height });
    const move = () => {
      const x = across(steps[now], width);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    };
    picture.append(cursor);
    picture.addEventListener("pointerdown", (event) => {
      const x = event.clientX - picture.getBoundingClientRect().left - left;
      const step = steps[0] + (x / width) * (steps.at(-1) - steps[0]);
      stop();
      go(
        steps.reduce(
          (best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best),
          0,
        ),
      );
    });
    parts.cursors.push({ picture, move });
    move();
    return picture;
  }

  // --- figures on the same axis ----------------------------------------------------------------

  const worst = (one, s) => Math.max(...one.balance.layers.map((layer) => layer.max_vio[s]));
  const sum = (one, s, name) => one.balance.layers.reduce((all, layer) => all + layer[name][s], 0);
  const FIGURES = [
    ["MaxVio of the worst layer", (one, s) => worst(one, s), (v) => v.toFixed(2), 0.5],
    [
      "Starved experts in all layers, dead ones among them",
      (one, s) => sum(one, s, "starved"),
      String,
      4,
    ],
    ["Dead experts in all layers", (one, s) => sum(one, s, "dead"), String, 4],
  ];

  function lines() {
    return el(
      "div",
      { class: "charts" },
      FIGURES.map(([title, value, , least]) => {
        const box = el("div");
        X.fitted(box, (width) => chart(value, least, width));
        return el("figure", {}, el("figcaption", {}, title), box);
      }),
    );
  }

  function chart(value, least, width) {
    const height = 110;
    const left = 30;
    const wide = width - left;
    const series = runs.map((one) => one.balance.steps.map((_, s) => value(one, s)));
    const top = Math.max(least, ...series.flat()) * 1.06;
    const picture = svg("svg", {
      class: "chart",
      viewBox: `${-left} -6 ${width} ${height + 24}`,
      "aria-hidden": "true",
    });
    const y = (v) => height - (height * v) / top;
    for (const tick of ticks(top))
      picture.append(
        svg("line", { x1: 0, x2: wide, y1: y(tick), y2: y(tick), class: "grid" }),
        svg("text", { x: -8, y: y(tick) + 4, class: "end" }, String(tick)),
      );
    series.forEach((values, r) =>
      picture.append(
        svg("polyline", {
          class: "series",
          "stroke-dasharray": DASHES[r % 4],
          style: { stroke: runColour(r) },
          points: values
            .map(
              (v, s) => `${across(runs[r].balance.steps[s], wide).toFixed(1)},${y(v).toFixed(1)}`,
            )
            .join(" "),
        }),
      ),
    );
    picture.append(
      svg("text", { x: 0, y: height + 15 }, `step ${steps[0]}`),
      svg("text", { x: wide, y: height + 15, class: "end" }, X.whole(steps.at(-1))),
    );
    return withCursor(picture, wide, height, left);
  }

  const runColour = (r) => ["var(--ink)", "var(--e3)", "var(--e0)", "var(--soft)"][r % 4];

  function ticks(top) {
    const raw = top / 3;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    return Array.from({ length: Math.floor(top / step) + 1 }, (_, i) =>
      Number((i * step).toPrecision(3)),
    );
  }

  function sample(r) {
    return svg(
      "svg",
      { viewBox: "0 0 30 8", class: "sample", "aria-hidden": "true" },
      svg("line", {
        x1: 0,
        x2: 30,
        y1: 4,
        y2: 4,
        class: "series",
        "stroke-dasharray": DASHES[r % 4],
        style: { stroke: runColour(r) },
      }),
    );
  }

  function update() {
    parts.cursors = parts.cursors.filter(({ picture, move }) => {
      move();
      return picture.isConnected;
    });
    parts.cards.forEach(({ one, layer, bars }) =>
      bars(layer.load[Math.max(0, place(one.balance))]),
    );
    const head = ["run", "balanced by", "MaxVio", "starved", "dead"].map((h) =>
      el("th", { scope: "col" }, h),
    );
    const rows = runs.map((one, r) => {
      const s = Math.max(0, place(one.balance));
      const last = one.balance.steps.at(-1);
      const ended = last < steps[now] ? el("small", {}, ` as of step ${X.whole(last)}`) : null;
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, sample(r), one.name, ended),
        el("td", {}, one.balancing),
        FIGURES.map(([, value, says]) => el("td", { class: "number" }, says(value(one, s)))),
      );
    });
    parts.table.replaceChildren(
      el("caption", {}, `At step ${X.whole(steps[now])}`),
      el("thead", {}, el("tr", {}, head)),
      el("tbody", {}, rows),
    );
  }

  return { show, once: true };
})();
