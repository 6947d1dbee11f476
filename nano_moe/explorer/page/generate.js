"use strict";
// Panel 5: a continuation as it is drawn, and the experts of each new token.

X.panels.generate = (() => {
  const { el, card } = X;
  let run, parts, trace, going;

  async function show(number, body) {
    going?.abort();
    run = number;
    trace = null;
    parts = build();
    if (!card(run).causal) return body.replaceChildren(X.note(X.FUTURE));
    const live = X.overview.live;
    body.replaceChildren(
      form(),
      live
        ? ""
        : X.note(
            `This is a recording. To go on from a text of yours: ${X.overview.command}`,
            "dim",
          ),
      parts.says,
      el(
        "div",
        { class: "columns" },
        el(
          "div",
          { class: "main" },
          card(run).layers.length ? parts.bar : "",
          parts.view.box,
          parts.card.box,
        ),
        parts.inspector.box,
      ),
    );
    if (!live) await recorded();
  }

  function build() {
    const expert = (e) => parts.card.show(run, X.state.layer, e);
    return {
      view: new X.TokenView({
        label: "Generated tokens: left and right move, up and down change the layer",
        oncurrent: (i) => parts.inspector.show(card(run), trace, i, X.state.layer),
        onlayer: (by) =>
          X.change(
            "layer",
            Math.min(Math.max(X.state.layer + by, 0), Math.max(0, card(run).layers.length - 1)),
          ),
      }),
      inspector: new X.Inspector({ onpick: expert, onlayer: (place) => X.change("layer", place) }),
      card: new X.ExpertCard(),
      bar: card(run).layers.length ? X.layerSlider(run, (place) => X.change("layer", place)) : null,
      says: el("p", { class: "say", "aria-live": "off" }),
    };
  }

  function form() {
    const live = X.overview.live;
    const { limits } = X.overview;
    const field = (label, given) => {
      const input = el("input", { type: "number", disabled: !live, ...given });
      parts[label] = input;
      return el("label", { class: "field" }, el("span", {}, label), input);
    };
    parts.prompt = el("textarea", {
      rows: 2,
      maxlength: limits.text,
      spellcheck: "false",
      "aria-label": "Prompt",
      disabled: !live,
      value: card(run).prompt,
    });
    parts.button = el(
      "button",
      { type: "submit", class: "main-button", disabled: !live },
      "Continue",
    );
    return el(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          if (going) going.abort();
          else go();
        },
      },
      parts.prompt,
      el(
        "div",
        { class: "row" },
        parts.button,
        field("tokens", { min: 1, max: limits.tokens, value: 80, step: 1 }),
        field("temperature", { min: 0, max: 10, value: 0.8, step: 0.1 }),
        field("top-p", { min: 0.01, max: 1, value: 0.95, step: 0.01 }),
        field("seed", { min: 0, max: 2 ** 31, value: 0, step: 1 }),
      ),
    );
  }

  async function go() {
    const own = parts;
    const stopped = new AbortController();
    going = stopped;
    own.button.textContent = "Stop";
    own.says.textContent = "…";
    const question = {
      prompt: own.prompt.value,
      tokens: Number(own.tokens.value),
      temperature: Number(own.temperature.value),
      top_p: Number(own["top-p"].value),
      seed: Number(own.seed.value),
    };
    try {
      for await (const line of X.stream(`runs/${run}/generate`, question, stopped.signal)) {
        if (own !== parts) return;
        if (line.prompt) begin(line.prompt);
        else add(line);
      }
    } catch (error) {
      if (error.name !== "AbortError") own.says.textContent = error.message;
    } finally {
      if (going === stopped) going = undefined;
      own.button.textContent = "Continue";
    }
  }

  async function recorded() {
    const { prompt, steps, settings } = await X.load(`runs/${run}/generation`);
    for (const [name, input] of [
      ["tokens", "tokens"],
      ["temperature", "temperature"],
      ["top_p", "top-p"],
      ["seed", "seed"],
    ])
      parts[input].value = settings[name];
    begin(prompt);
    steps.forEach(add);
  }

  function begin(prompt) {
    trace = structuredClone(prompt);
    trace.nats = null;
    parts.from = trace.tokens.length;
    parts.view.place = X.state.layer;
    parts.view.kept = 0;
    parts.view.show(trace, parts.from);
  }

  function add({ token, seconds, choices }) {
    trace.tokens.push(token);
    choices.forEach((choice, l) => {
      for (const name of ["probs", "chosen", "weights"]) trace.layers[l][name].push(choice[name]);
      trace.layers[l].dropped = null;
    });
    const last = trace.tokens.length - 1;
    const made = trace.tokens.length - parts.from;
    parts.view.append(last);
    if (!parts.view.box.contains(document.activeElement)) parts.view.keep(last);
    parts.says.textContent =
      `${X.plural(made, "token")} in ${seconds.toFixed(1)} s, ` +
      `${(made / Math.max(seconds, 1e-3)).toFixed(1)} tokens/s.`;
  }

  X.on("layer", () => {
    if (!parts || !trace || X.state.run !== run) return;
    parts.bar?.set(X.state.layer);
    parts.view.layer(X.state.layer);
    parts.view.point(parts.view.kept);
    parts.card.close();
  });

  return { show };
})();
