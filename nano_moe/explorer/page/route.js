"use strict";
// Panel 1: a text and where its tokens go.

X.panels.route = (() => {
  const { el, card } = X;
  const EXAMPLE =
    "The old queen counted 42 foxes. La reine en compta dix. def count(foxes): return len(foxes)";
  let run, trace, parts;

  async function show(number, body) {
    run = number;
    if (!card(run).layers.length) {
      body.replaceChildren(
        X.note(
          `${card(run).name} is dense: every token takes the same way through every layer, ` +
            "so there is no routing to show. Compute and Generate work for it, too.",
        ),
      );
      parts = trace = null;
      return X.change("token", null);
    }
    const none = (fault) => ({ domains: [], each: 0, fault }); // typing needs no passages
    const { domains, each, fault } = await X.load(`runs/${run}/passages`).catch(none);
    if (run !== number) return;
    parts = build();
    body.replaceChildren(
      sources(domains, each),
      fault ? X.note(fault.message, "fault") : "",
      el(
        "div",
        { class: "columns" },
        el(
          "div",
          { class: "main" },
          parts.typed,
          el(
            "div",
            { class: "row" },
            parts.bar,
            el("span", { class: "dim keys" }, "Keys: ← → tokens, ↑ ↓ layers"),
          ),
          parts.view.box,
          parts.cut,
          parts.experts.box,
          parts.card.box,
        ),
        parts.inspector.box,
      ),
    );
    await (domains.length ? passage(domains[0].number, 0) : typed());
  }

  function build() {
    const view = new X.TokenView({
      label: "Tokens: left and right move, up and down change the layer",
      oncurrent: current,
      onlayer: (by) =>
        layer(Math.min(Math.max(X.state.layer + by, 0), card(run).layers.length - 1)),
    });
    const expert = (e) => parts.card.show(run, X.state.layer, e);
    return {
      view,
      inspector: new X.Inspector({ onpick: expert, onlayer: layer }),
      experts: new X.ExpertBar({ onpick: expert, onpoint: (e) => view.highlight(e) }),
      card: new X.ExpertCard(),
      bar: X.layerSlider(run, layer),
      typed: textarea(),
      cut: el("p", { class: "dim", hidden: true }),
    };
  }

  function textarea() {
    const live = X.overview.live;
    let timer;
    const area = el("textarea", {
      rows: 3,
      maxlength: X.overview.limits.text,
      spellcheck: "false",
      "aria-label": "Your own text",
      placeholder: live ? "Type or paste a text …" : "",
      disabled: !live,
      value: live ? EXAMPLE : "",
      oninput: () => {
        clearTimeout(timer);
        timer = setTimeout(typed, 120);
      },
    });
    const help = live
      ? null
      : X.note(`Typing needs the live explorer: ${X.overview.command}`, "dim");
    return Object.assign(el("div", { class: "typed", hidden: true }, area, help), { area });
  }

  function sources(domains, each) {
    let domain = domains[0]?.number ?? null;
    let number = 0;
    const options = domains.map(({ number: d, name }) => [d, name]);
    const pick = X.choice(
      "Text",
      [...options, ["own", "your own text"]],
      domain ?? "own",
      (value) => {
        domain = value === "own" ? null : value;
        number = 0;
        another.hidden = domain === null || each < 2;
        parts.typed.hidden = domain !== null;
        if (domain === null) {
          typed();
          if (!parts.typed.area.disabled) parts.typed.area.focus();
        } else passage(domain, number);
      },
    );
    const another = el(
      "button",
      {
        type: "button",
        class: "plain",
        hidden: domain === null || each < 2,
        onclick: () => passage(domain, (number = (number + 1) % each)),
      },
      "another passage",
    );
    parts.typed.hidden = domain !== null;
    return el("div", { class: "row" }, pick, another);
  }

  const passage = (domain, number) => follow(X.load(`runs/${run}/passages/${domain}/${number}`));

  function typed() {
    const text = parts.typed.area.value;
    if (!X.overview.live)
      return follow(Promise.resolve({ tokens: [], nats: [], layers: [], cut: 0 }));
    return follow(X.ask(`runs/${run}/route`, { text }));
  }

  /** Show what was asked for last, whatever else comes in meanwhile. */
  async function follow(asked) {
    const own = parts;
    own.asked = asked;
    own.view.box.setAttribute("aria-busy", "true");
    try {
      const found = await asked;
      if (own.asked === asked && own === parts) draw(found);
    } catch (error) {
      if (own.asked !== asked) return;
      own.cut.hidden = false;
      own.cut.textContent = error.message;
    }
    own.view.box.removeAttribute("aria-busy");
  }

  function draw(found) {
    trace = found;
    parts.cut.hidden = !found.cut;
    const more = X.plural(found.cut, "token");
    parts.cut.textContent = `${more} more do not fit the model’s context and are left out.`;
    parts.view.place = X.state.layer;
    parts.view.show(found);
    parts.experts.show(found.layers[X.state.layer], card(run).n_experts);
    if (found.tokens.length) return;
    parts.inspector.show(card(run), found, 0, 0);
    X.change("token", null);
  }

  function current(i) {
    parts.inspector.show(card(run), trace, i, X.state.layer);
    X.change("token", { trace, i });
  }

  function layer(place) {
    X.change("layer", place);
  }

  X.on("layer", () => {
    if (!parts || !trace) return;
    parts.bar.set(X.state.layer);
    parts.view.layer(X.state.layer);
    parts.view.point(parts.view.kept);
    parts.experts.show(trace.layers[X.state.layer], card(run).n_experts);
    parts.card.close();
  });

  return { show };
})();

/** A slider over the sparse layers of a run. */
X.layerSlider = (run, oninput) => {
  const { layers } = X.card(run);
  return X.slider({
    label: "Layer",
    min: 0,
    max: layers.length - 1,
    value: Math.min(X.state.layer, layers.length - 1),
    says: (place) => `${layers[place]}`,
    oninput,
  });
};
