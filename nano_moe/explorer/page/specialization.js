"use strict";
// Panel 4: which experts the domains and the kinds of tokens visit, and how much that tells.

X.panels.specialization = (() => {
  const { el, percent, card } = X;
  const NAMES = {
    domain: "its domain",
    kind: "what kind of token it is",
    token: "which token it is",
  };
  let run, found, parts;

  async function show(number, body) {
    run = number;
    found = null;
    if (!card(run).layers.length)
      return body.replaceChildren(X.note(`${card(run).name} is dense: it has no experts.`));
    if (!card(run).causal) return body.replaceChildren(X.note(X.FUTURE));
    body.replaceChildren(
      X.note("Routing part of the validation split; this takes some seconds, once …"),
    );
    const loaded = await X.load(`runs/${run}/specialization`);
    if (run !== number) return;
    found = loaded;
    parts = {
      slider: X.layerSlider(run, (place) => X.change("layer", place)),
      maps: el("div", { class: "maps" }),
      read: el("p", { class: "say", "aria-live": "polite" }),
      card: new X.ExpertCard(),
    };
    body.replaceChildren(
      information(),
      el("div", { class: "row" }, parts.slider),
      parts.maps,
      parts.read,
      parts.card.box,
      X.note(
        `Counted over ${X.whole(found.tokens)} of ${X.whole(found.of)} tokens for validation.`,
        "dim",
      ),
    );
    draw();
  }

  function draw() {
    const spread = found.layers[X.state.layer] ?? found.layers[0];
    parts.slider.set(found.layers.indexOf(spread));
    parts.maps.replaceChildren(
      heat("Domain", found.domains, spread.domains, spread),
      heat("Kind of token", found.kinds, spread.kinds, spread),
    );
    parts.read.textContent =
      "Each number: how many times its even share the expert gets from the row. " +
      "Point at a cell, or choose an expert to see its tokens.";
    parts.card.close();
  }

  // --- heat maps -------------------------------------------------------------------------------

  function heat(title, names, table, spread) {
    const n = spread.experts.length;
    const rows = names
      .map((name, a) => ({ name, cells: table[a], sum: table[a].reduce((x, y) => x + y, 0) }))
      .filter((row) => row.sum);
    const heads = spread.experts.map((_, e) =>
      el(
        "th",
        { scope: "col" },
        el(
          "button",
          {
            type: "button",
            class: "plain",
            "aria-label": `Expert ${e}: show its favourite tokens`,
            onclick: () => parts.card.show(run, found.layers.indexOf(spread), e),
          },
          n > 16 ? String(e) : [X.swatch(e), String(e)],
        ),
      ),
    );
    const body = rows.map((row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, row.name),
        row.cells.map((count, e) => cell(row, count, e, spread, n)),
      ),
    );
    const map = el(
      "table",
      { class: n > 16 ? "heat many" : "heat" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, title), heads)),
      el("tbody", {}, body),
    );
    map.addEventListener("keydown", walk);
    map.querySelector("td")?.setAttribute("tabindex", 0);
    return el("div", { class: "scroll" }, map);
  }

  function cell(row, count, e, spread, n) {
    const share = count / row.sum;
    const even = spread.experts[e].share;
    const lift = even ? share / even : 0;
    const strength = Math.min(1, Math.abs(Math.log2(Math.max(lift, 0.01))) / 2);
    const says = () => {
      parts.read.textContent =
        `${row.name}: ${percent(share, 1)} of its assignments go to expert ${e}, ` +
        `which takes ${percent(even, 1)} of all: ${lift.toFixed(2)} times its share.`;
    };
    return el(
      "td",
      {
        tabindex: -1,
        onpointerenter: says,
        onfocus: says,
        "aria-label": `${row.name}, expert ${e}: ${lift.toFixed(2)} times its share`,
        style: {
          "--heat": lift > 1 ? "var(--more)" : "var(--less)",
          "--strength": `${(64 * strength).toFixed(0)}%`,
        },
      },
      n > 16 ? "" : lift.toFixed(1),
    );
  }

  function walk(event) {
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[
      event.key
    ];
    const from = event.target.closest("td");
    if (!by || !from) return;
    event.preventDefault();
    const rows = [...from.closest("tbody").rows];
    const to = rows[rows.indexOf(from.parentNode) + by[0]]?.cells[from.cellIndex + by[1]];
    if (to?.tagName !== "TD") return;
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  // --- information -----------------------------------------------------------------------------

  function information() {
    const most = Math.max(...found.layers.map((layer) => layer.entropy));
    const columns = found.layers[0].information.map((_, a) => a);
    return el(
      "figure",
      {},
      el("figcaption", {}, "What is known of a token’s expert, in bits, once one knows …"),
      el(
        "div",
        { class: "informations" },
        columns.map((a) => {
          const { attribute } = found.layers[0].information[a];
          return el(
            "div",
            {},
            el("h4", {}, NAMES[attribute]),
            found.layers.map((layer) => bar(layer, layer.information[a], most)),
          );
        }),
      ),
      X.note(
        "The line marks the control: the same with labels shuffled (domains by whole windows of " +
          "text, the others token by token). A bar’s full width is what knowing the expert " +
          "itself would tell.",
        "dim",
      ),
    );
  }

  function bar(layer, { bits, control }, most) {
    const says = `${bits.toFixed(2)} bits, control ${control.toFixed(2)}`;
    const width = (x) => `${(100 * Math.min(1, x / most)).toFixed(2)}%`;
    return el(
      "div",
      {
        class: "bits",
        role: "img",
        "aria-label": `layer ${layer.layer}: ${says}`,
      },
      el("span", { class: "name" }, `layer ${layer.layer}`),
      el(
        "span",
        { class: "track" },
        el("i", { style: { width: width(bits) } }),
        el("u", { style: { left: width(control) } }),
      ),
      el("small", {}, bits.toFixed(2), el("span", { class: "dim" }, ` (${control.toFixed(2)})`)),
    );
  }

  X.on("layer", () => {
    if (found && parts && X.state.run === run) draw();
  });

  return { show };
})();
