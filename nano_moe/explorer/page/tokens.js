"use strict";
// A routed text: its tokens, the load of each expert, and all about the token that is looked at.

/** The tokens of a trace, each with its experts; one of them is current, by mouse or keyboard. */
X.TokenView = class {
  constructor({ label, oncurrent, onlayer }) {
    this.oncurrent = oncurrent;
    this.onlayer = onlayer;
    this.box = X.el("div", { class: "tokens", role: "listbox", "aria-label": label, tabindex: -1 });
    this.nodes = [];
    this.kept = 0;
    for (const kind of ["pointerover", "focusin", "click"])
      this.box.addEventListener(kind, (event) => this.touched(event));
    this.box.addEventListener("pointerleave", () => this.point(this.kept));
    this.box.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show a trace; tokens before `from` are context, set apart. */
  show(trace, from = 0) {
    this.trace = trace;
    this.from = from;
    this.nodes = [];
    this.box.replaceChildren();
    trace.tokens.forEach((_, i) => this.append(i));
    this.kept = Math.min(this.kept, Math.max(0, trace.tokens.length - 1));
    if (this.nodes.length) this.keep(this.kept);
  }

  append(i) {
    const token = this.trace.tokens[i];
    const word = X.el("span", { class: "w" }, X.visible(token));
    const node = X.el("span", { class: "t", role: "option", "data-i": i, tabindex: -1 },
      word, X.el("span", { class: "n", "aria-hidden": "true" }));
    if (i < this.from) node.classList.add("context");
    this.nodes[i] = node;
    this.box.append(node);
    if (token.includes("\n")) this.box.append(X.el("br"));
    this.colour(i);
  }

  /** Show another layer, by its place among the sparse ones. */
  layer(place) {
    this.place = place;
    this.nodes.forEach((_, i) => this.colour(i));
  }

  colour(i) {
    const layer = this.trace.layers[this.place ?? 0];
    const node = this.nodes[i];
    const says = `${X.visible(this.trace.tokens[i])}`;
    if (!layer) return node.setAttribute("aria-label", says);
    const chosen = layer.chosen[i], weights = layer.weights[i];
    const dropped = layer.dropped?.[i] ?? [];
    node.lastChild.textContent = gloss(chosen, dropped);
    node.classList.toggle("dropped", dropped.length > 0);
    node.classList.toggle("none", chosen.length === 0);
    X.styled(node, {
      "--c": chosen.length ? X.colour(chosen[0]) : "transparent",
      "--bar": bar(chosen, weights),
    });
    const named = chosen.map((e, k) =>
      `expert ${e} ${X.percent(weights[k])}${dropped.includes(e) ? ", dropped" : ""}`);
    node.setAttribute("aria-label", `${says}: ${named.join(", ") || "no expert"}`);
  }

  /** Fade the tokens that do not visit an expert; null: none. */
  highlight(expert) {
    const layer = this.trace?.layers[this.place ?? 0];
    this.nodes.forEach((node, i) => node.classList.toggle(
      "faded", expert !== null && Boolean(layer) && !layer.chosen[i].includes(expert)));
  }

  touched(event) {
    const node = event.target.closest?.(".t");
    if (!node) return;
    const i = Number(node.dataset.i);
    if (event.type === "pointerover") this.point(i);
    else this.keep(i);
  }

  /** Look at a token for now. */
  point(i) {
    if (!this.nodes[i]) return;
    this.nodes.forEach((node, j) => {
      node.setAttribute("aria-selected", String(j === this.kept));
      node.classList.toggle("current", j === i);
      node.tabIndex = j === this.kept ? 0 : -1;
    });
    this.oncurrent(i);
  }

  /** Look at a token until another one is chosen. */
  keep(i) {
    this.kept = i;
    this.point(i);
  }

  key(event) {
    const last = this.nodes.length - 1;
    const to = { ArrowRight: this.kept + 1, ArrowLeft: this.kept - 1, Home: 0, End: last }[event.key];
    const deeper = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (to === undefined && !deeper) return;
    event.preventDefault();
    if (deeper) this.onlayer(deeper);
    else this.nodes[Math.min(Math.max(to, 0), last)]?.focus();
  }
};

/** The numbers under a token: of two experts both, of more the first. */
function gloss(chosen, dropped) {
  const said = chosen.slice(0, chosen.length > 2 ? 1 : 2);
  return said.map((e) => (dropped.includes(e) ? `✕${e}` : String(e))).join("+") || "–";
}

/** The line under a token, divided as its weights are. */
function bar(chosen, weights) {
  const sum = weights.reduce((a, b) => a + b, 0) || 1;
  let at = 0;
  const stops = chosen.map((e, k) => {
    const begin = at;
    at += (100 * weights[k]) / sum;
    return `${X.colour(e)} ${begin.toFixed(1)}% ${at.toFixed(1)}%`;
  });
  return stops.length ? `linear-gradient(90deg, ${stops.join(", ")})` : "none";
}

/** Load of each expert in this text, as a row of buttons. */
X.ExpertBar = class {
  constructor({ onpick, onpoint }) {
    this.onpick = onpick;
    this.onpoint = onpoint;
    this.box = X.el("div", { class: "experts", role: "group", "aria-label": "Experts" });
  }

  show(layer, n) {
    const counts = Array(n).fill(0);
    for (const chosen of layer?.chosen ?? []) for (const e of chosen) counts[e] += 1;
    const total = counts.reduce((a, b) => a + b, 0) || 1;
    const most = Math.max(...counts, 2 * total / n);
    this.box.classList.toggle("few", n <= 8);
    this.box.replaceChildren(...counts.map((count, e) => this.button(e, count / total, most / total)));
  }

  button(e, share, most) {
    const height = `${(100 * share / most).toFixed(1)}%`;
    return X.el("button", {
      type: "button", class: "expert", "data-expert": e,
      "aria-label": `Expert ${e}, ${X.percent(share)} of this text; show its favourite tokens`,
      onclick: () => this.onpick(e),
      onpointerenter: () => this.onpoint(e), onpointerleave: () => this.onpoint(null),
      onfocus: () => this.onpoint(e), onblur: () => this.onpoint(null),
    },
    X.el("span", { class: "column" },
      X.el("i", { style: { height, background: X.colour(e) } })),
    X.el("b", {}, String(e)),
    X.el("small", {}, X.percent(share)));
  }
};

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
      this.head(trace, i), this.more(),
      ...(layer ? [this.table(card, layer, i), this.remark(card, layer, i), this.way(card, trace, i, place)]
        : [X.note("A dense layer: one way for every token.")]));
  }

  head(trace, i) {
    const nats = trace.nats?.[i];
    const surprise = nats === undefined || nats === null ? "" :
      ` · probability ${X.percent(Math.exp(-nats), nats > 4.6 ? 2 : 0)}, ${(nats / Math.LN2).toFixed(1)} bits`;
    return X.el("div", { class: "head" },
      X.el("span", { class: "quoted" }, X.visible(trace.tokens[i], { blanks: true })),
      X.el("span", { class: "dim" }, `token ${i + 1} of ${trace.tokens.length}${surprise}`));
  }

  /** On a narrow screen the rest unfolds; a wide one shows it at once, and no button. */
  more() {
    const button = X.el("button", {
      type: "button", class: "plain more",
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
    if (rest) rows.push(X.el("tr", { class: "dim" }, X.el("td", { colspan: 2 }, ""),
      X.el("td", { colspan: 2 }, `${ranked.length - shown} others share ${X.percent(rest, 1)}`)));
    const heads = ["rank", "expert", "probability", "weight"].map((h) => X.el("th", { scope: "col" }, h));
    return X.el("table", { class: "ranks" },
      X.el("caption", {}, `Layer ${layer.layer}`),
      X.el("thead", {}, X.el("tr", {}, heads)), X.el("tbody", {}, rows));
  }

  row({ e, p, place }, layer, i) {
    const k = layer.chosen[i].indexOf(e);
    const full = layer.dropped?.[i].includes(e);
    const weight = k < 0 ? "" : `${layer.weights[i][k].toFixed(3)}${full ? " ✕" : ""}`;
    return X.el("tr", { class: k >= 0 ? "chosen" : "", "data-expert": e },
      X.el("td", { class: "rank" }, `${place}`),
      X.el("td", {}, X.el("button", {
        type: "button", class: "plain", onclick: () => this.onpick(e),
        "aria-label": `Expert ${e}${k >= 0 ? ", chosen" : ""}; show its favourite tokens`,
      }, X.swatch(e), `${e}`, k >= 0 ? X.el("span", { class: "dot", "aria-hidden": "true" }, "●") : null)),
      X.el("td", { class: "measure" },
        X.el("i", { style: { width: `${(100 * p).toFixed(1)}%`, background: X.colour(e) } }),
        X.el("span", {}, X.percent(p, 1))),
      X.el("td", { class: "number" }, weight));
  }

  remark(card, layer, i) {
    const chosen = layer.chosen[i], ranks = rank(layer, i);
    const lifted = chosen.some((e) => ranks.findIndex((row) => row.e === e) >= chosen.length);
    const words = [];
    if (layer.dropped?.[i].length)
      words.push(`In training, expert ${layer.dropped[i].join(" and ")} would be full before this token ` +
        `(capacity factor ${card.capacity_factor}), and the token would go by. Here nothing is dropped.`);
    const causes = [
      layer.bias ? "the balancing bias, which is added before the choice and not to the weight" : "",
      card.n_groups > 1 ? "the limit to a few groups of experts" : "",
    ].filter(Boolean);
    if (lifted && causes.length) words.push(`A likelier expert is passed over: by ${causes.join(", or by ")}.`);
    if (card.routing === "hash") words.push("A fixed hash of the token decides; nothing is learned.");
    if (!card.causal) words.push("Here experts choose tokens, from later ones, too.");
    return words.length ? X.note(words.join(" "), "remark") : "";
  }

  /** The token's way through all layers. */
  way(card, trace, i, place) {
    const n = card.n_experts, side = card.n_shared ? 30 : 0, width = 320, left = 22 + side, gap = 44;
    const x = (e) => left + ((width - left - 6) * (e + 0.5)) / n;
    const r = Math.max(2.5, Math.min(9, (width - left - 6) / n / 2 - 1.5));
    const rows = Array.from({ length: card.n_layers }, (_, number) =>
      trace.layers.findIndex((layer) => layer.layer === number));
    const y = (row) => 16 + row * gap;
    const picture = X.svg("svg", {
      class: "way", viewBox: `0 0 ${width} ${y(rows.length - 1) + 22}`, role: "img",
      "aria-label": wayInWords(trace, i),
    });
    picture.append(...links(trace, i, rows, x, y));
    rows.forEach((at, row) => picture.append(...this.stop(card, trace.layers[at], i, row, { x, y, r, n, place, at, width })));
    return X.el("figure", {}, X.el("figcaption", {}, "Its way through the layers"), picture);
  }

  stop(card, layer, i, row, { x, y, r, n, place, at, width }) {
    const here = at === place;
    const parts = [X.svg("text", { x: 0, y: y(row) + 4, class: here ? "now" : "" }, String(row))];
    if (!layer) {
      parts.push(X.svg("rect", { x: x(0) - r, y: y(row) - 5, width: width - x(0), height: 10, rx: 5, class: "dense" }),
        X.svg("text", { x: x((n - 1) / 2), y: y(row) + 3.5, class: "tiny" }, "dense: one way for all"));
      return parts;
    }
    for (let s = 0; s < Math.min(card.n_shared, 2); s += 1)
      parts.push(X.svg("rect", { x: 18 + 13 * s, y: y(row) - 5.5, width: 11, height: 11, class: "shared" }),
        X.svg("text", { x: 23.5 + 13 * s, y: y(row) + 3.5, class: "tiny inside" }, "S"));
    for (let e = 0; e < n; e += 1) parts.push(this.station(layer, i, e, row, { x, y, r, n }));
    parts.push(X.svg("rect", {
      x: 0, y: y(row) - 20, width, height: 40, class: here ? "row now" : "row",
      onclick: () => this.onlayer(at),
    }, X.svg("title", {}, `Layer ${row}`)));
    return parts;
  }

  station(layer, i, e, row, { x, y, r, n }) {
    const k = layer.chosen[i].indexOf(e);
    const size = k < 0 ? r * 0.62 : r;
    const circle = X.svg("circle", {
      cx: x(e), cy: y(row), r: size, class: k < 0 ? "idle" : "taken",
      style: k < 0 ? {} : { fill: X.colour(e) },
    });
    if (k < 0 || (n > 16 && k > 1)) return circle;
    const place = n > 16 ? { x: x(e), y: y(row) + r + 9 } : { x: x(e), y: y(row) + 3.5 };
    return X.svg("g", {}, circle, X.svg("text", { ...place, class: n > 16 ? "tiny" : "tiny inside" }, String(e)));
  }
};

/** Experts by probability; of equal ones the chosen first. */
function rank(layer, i) {
  const order = layer.chosen[i];
  const late = (e) => (order.includes(e) ? order.indexOf(e) : order.length + e);
  return layer.probs[i].map((p, e) => ({ e, p }))
    .sort((a, b) => b.p - a.p || late(a.e) - late(b.e))
    .map((row, place) => ({ ...row, place: place + 1 }));
}

function shared(card) {
  const several = card.n_shared > 1 ? `×${card.n_shared}` : "";
  return X.el("tr", { class: "chosen" },
    X.el("td", { class: "rank" }, "–"),
    X.el("td", {}, X.el("i", { class: "swatch square", "aria-hidden": "true" }), `S${several}`,
      X.el("span", { class: "dot", "aria-hidden": "true" }, "●")),
    X.el("td", { class: "dim" }, "shared, every token"),
    X.el("td", { class: "number" }, card.shared_gate ? "a gate’s" : "1.000"));
}

const LINKED = 3; // experts of a layer between which lines are drawn: with more, nobody sees any

/** Lines between the first experts of one layer and of the next, as wide as their weights. */
function links(trace, i, rows, x, y) {
  const found = [];
  for (let row = 1; row < rows.length; row += 1) {
    const [above, below] = [trace.layers[rows[row - 1]], trace.layers[rows[row]]];
    if (!above || !below) continue;
    above.chosen[i].slice(0, LINKED).forEach((a, j) => below.chosen[i].slice(0, LINKED).forEach((b, k) => {
      const weight = Math.min(1, above.weights[i][j]) * Math.min(1, below.weights[i][k]);
      found.push(X.svg("path", {
        class: "link", d: `M${x(a)},${y(row - 1)} C${x(a)},${y(row) - 18} ${x(b)},${y(row - 1) + 18} ${x(b)},${y(row)}`,
        "stroke-width": (0.6 + 5 * weight).toFixed(2),
      }));
    }));
  }
  return found;
}

function wayInWords(trace, i) {
  return trace.layers.map((layer) =>
    `layer ${layer.layer}: expert ${layer.chosen[i].join(" and ") || "none"}`).join("; ");
}

/** What one expert takes most, over part of the validation split. */
X.ExpertCard = class {
  constructor() {
    this.box = X.el("div", { class: "card", hidden: true, "aria-live": "polite" });
  }

  close() {
    this.box.hidden = true;
  }

  async show(run, place, e) {
    const head = X.el("div", { class: "cardhead" }, X.el("h3", {}, X.swatch(e), `Expert ${e}, layer ${X.card(run).layers[place]}`),
      X.el("button", { type: "button", class: "plain", "aria-label": "Close", onclick: () => this.close() }, "✕"));
    this.box.hidden = false;
    const asked = (this.asked = {});
    this.box.replaceChildren(head, X.note("Counting over the validation split …"));
    let body;
    try {
      body = this.body(await X.load(`runs/${run}/specialization`), place, e);
    } catch (error) {
      body = [X.note(error.message, "fault")];
    }
    if (asked === this.asked) this.box.replaceChildren(head, ...body);
  }

  body(found, place, e) {
    const spread = found.layers[place], expert = spread.experts[e], n = spread.experts.length;
    const word = (token) => X.el("span", { class: "word" }, X.visible(token, { blanks: true }));
    const list = (title, rows) => X.el("div", {}, X.el("h4", {}, title), X.el("ul", { class: "words" },
      rows.map(([token, says]) => X.el("li", {}, word(token), X.el("small", {}, says)))));
    const domains = found.domains.map((name, d) => {
      const sum = spread.domains[d].reduce((a, b) => a + b, 0);
      return [name, sum ? spread.domains[d][e] / sum : 0];
    }).sort((a, b) => b[1] - a[1]);
    const most = Math.max(...domains.map((row) => row[1]), 2 / n);
    return [
      X.note(`It takes ${X.percent(expert.share, 1)} of the layer’s assignments (even: ${X.percent(1 / n, 1)}), ` +
        `over ${X.whole(found.tokens)} tokens of the validation split.`, "dim"),
      X.el("div", { class: "cardcols" },
        list("Comes most often", expert.most.map(([t, count]) => [t, X.whole(count)])),
        list("Most faithful to it", expert.keenest.map(([t, share]) => [t, X.percent(share)])),
        X.el("div", {}, X.el("h4", {}, "Share of each domain"), X.el("ul", { class: "bars" },
          domains.map(([name, share]) => X.el("li", {}, X.el("span", {}, name),
            X.el("span", { class: "track" }, X.el("i", { style: { width: `${(100 * share / most).toFixed(1)}%`, background: X.colour(e) } }),
              X.el("u", { style: { left: `${(100 / n / most).toFixed(1)}%` }, title: "an even share" })),
            X.el("small", {}, X.percent(share)))))))];
  }
};
