"use strict";
// A routed text: its tokens, and the load of each expert.

{
  /** The tokens of a trace, each with its experts; one of them is current, by mouse or keyboard. */
  X.TokenView = class {
    constructor({ label, oncurrent, onlayer }) {
      this.oncurrent = oncurrent;
      this.onlayer = onlayer;
      this.box = X.el("div", {
        class: "tokens",
        role: "listbox",
        "aria-label": label,
        tabindex: -1,
      });
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
      const node = X.el(
        "span",
        { class: "t", role: "option", "data-i": i, tabindex: -1 },
        word,
        X.el("span", { class: "n", "aria-hidden": "true" }),
      );
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
      const chosen = layer.chosen[i];
      const weights = layer.weights[i];
      const dropped = layer.dropped?.[i] ?? [];
      node.lastChild.textContent = gloss(chosen, dropped);
      node.classList.toggle("dropped", dropped.length > 0);
      node.classList.toggle("none", chosen.length === 0);
      X.styled(node, {
        "--c": chosen.length ? X.colour(chosen[0]) : "transparent",
        "--bar": bar(chosen, weights),
      });
      const named = chosen.map(
        (e, k) => `expert ${e} ${X.percent(weights[k])}${dropped.includes(e) ? ", dropped" : ""}`,
      );
      node.setAttribute("aria-label", `${says}: ${named.join(", ") || "no expert"}`);
    }

    /** Fade the tokens that do not visit an expert; null: none. */
    highlight(expert) {
      const layer = this.trace?.layers[this.place ?? 0];
      this.nodes.forEach((node, i) =>
        node.classList.toggle(
          "faded",
          expert !== null && Boolean(layer) && !layer.chosen[i].includes(expert),
        ),
      );
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
      const to = { ArrowRight: this.kept + 1, ArrowLeft: this.kept - 1, Home: 0, End: last }[
        event.key
      ];
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
      const most = Math.max(...counts, (2 * total) / n);
      this.box.classList.toggle("few", n <= 8);
      this.box.replaceChildren(
        ...counts.map((count, e) => this.button(e, count / total, most / total)),
      );
    }

    button(e, share, most) {
      const height = `${((100 * share) / most).toFixed(1)}%`;
      return X.el(
        "button",
        {
          type: "button",
          class: "expert",
          "data-expert": e,
          "aria-label": `Expert ${e}, ${X.percent(share)} of this text; show its favourite tokens`,
          onclick: () => this.onpick(e),
          onpointerenter: () => this.onpoint(e),
          onpointerleave: () => this.onpoint(null),
          onfocus: () => this.onpoint(e),
          onblur: () => this.onpoint(null),
        },
        X.el(
          "span",
          { class: "column" },
          X.el("i", { style: { height, background: X.colour(e) } }),
        ),
        X.el("b", {}, String(e)),
        X.el("small", {}, X.percent(share)),
      );
    }
  };
}
