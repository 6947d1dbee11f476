"use strict";
// All about one expert: the tokens and domains that it takes most.

/** What one expert takes most, over part of the validation split. */
X.ExpertCard = class {
  constructor() {
    this.box = X.el("div", { class: "card", hidden: true, "aria-live": "polite" });
  }

  close() {
    this.box.hidden = true;
  }

  async show(run, place, e) {
    const head = X.el(
      "div",
      { class: "cardhead" },
      X.el("h3", {}, X.swatch(e), `Expert ${e}, layer ${X.card(run).layers[place]}`),
      X.el(
        "button",
        { type: "button", class: "plain", "aria-label": "Close", onclick: () => this.close() },
        "✕",
      ),
    );
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
    const spread = found.layers[place];
    const expert = spread.experts[e];
    const n = spread.experts.length;
    const word = (token) => X.el("span", { class: "word" }, X.visible(token, { blanks: true }));
    const list = (title, rows) =>
      X.el(
        "div",
        {},
        X.el("h4", {}, title),
        X.el(
          "ul",
          { class: "words" },
          rows.map(([token, says]) => X.el("li", {}, word(token), X.el("small", {}, says))),
        ),
      );
    const domains = found.domains
      .map((name, d) => {
        const sum = spread.domains[d].reduce((a, b) => a + b, 0);
        return [name, sum ? spread.domains[d][e] / sum : 0];
      })
      .sort((a, b) => b[1] - a[1]);
    const most = Math.max(...domains.map((row) => row[1]), 2 / n);
    return [
      X.note(
        `It takes ${X.percent(expert.share, 1)} of the layer’s assignments ` +
          `(even: ${X.percent(1 / n, 1)}), ` +
          `over ${X.whole(found.tokens)} tokens of the validation split.`,
        "dim",
      ),
      X.el(
        "div",
        { class: "cardcols" },
        list(
          "Comes most often",
          expert.most.map(([t, count]) => [t, X.whole(count)]),
        ),
        list(
          "Most faithful to it",
          expert.keenest.map(([t, share]) => [t, X.percent(share)]),
        ),
        X.el(
          "div",
          {},
          X.el("h4", {}, "Share of each domain"),
          X.el(
            "ul",
            { class: "bars" },
            domains.map(([name, share]) =>
              X.el(
                "li",
                {},
                X.el("span", {}, name),
                X.el(
                  "span",
                  { class: "track" },
                  X.el("i", {
                    style: {
                      width: `${((100 * share) / most).toFixed(1)}%`,
                      background: X.colour(e),
                    },
                  }),
                  X.el("u", {
                    style: { left: `${(100 / n / most).toFixed(1)}%` },
                    title: "an even share",
                  }),
                ),
                X.el("small", {}, X.percent(share)),
              ),
            ),
          ),
        ),
      ),
    ];
  }
};
