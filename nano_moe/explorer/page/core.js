"use strict";
// What all panels share: documents, elements, figures in words, colours, and the state they watch.

const X = (() => {
  const documents = JSON.parse(document.getElementById("documents").textContent);
  const { overview } = documents;
  const waiting = new Map();

  // --- documents -------------------------------------------------------------------------------

  /** A document of contract.py by its key; throws an Error with one line where there is none. */
  function load(key) {
    if (!waiting.has(key)) {
      const asked = key in documents ? Promise.resolve(documents[key]) : fetched(key);
      waiting.set(key, asked.then(checked));
      waiting.get(key).catch(() => waiting.delete(key));
    }
    return waiting.get(key);
  }

  async function fetched(key) {
    if (!overview.live) return { error: "not in this file" };
    return answer(fetch(`/api/${key}`));
  }

  /** The JSON answer to a question put to the server. */
  async function ask(key, question, signal) {
    return checked(await answer(post(key, question, signal)));
  }

  /** The lines of a streamed answer, one object after the other. */
  async function* stream(key, question, signal) {
    const response = await post(key, question, signal);
    if (!response.ok) checked(await response.json());
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = lines.pop();
      for (const line of lines) yield checked(JSON.parse(line));
      if (done) return;
    }
  }

  async function post(key, question, signal) {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify(question);
    return reached(fetch(`/api/${key}`, { method: "POST", headers, body, signal }));
  }

  async function answer(request) {
    return (await reached(request)).json();
  }

  async function reached(request) {
    try {
      return await request;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the explorer has ended; start it again: " + overview.command);
    }
  }

  function checked(content) {
    if (content.error) throw new Error(content.error);
    return content;
  }

  // --- elements --------------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";

  /** An element. Strings among the children are text, never markup. */
  function el(tag, given = {}, ...children) {
    return filled(document.createElement(tag), given, children);
  }

  function svg(tag, given = {}, ...children) {
    return filled(document.createElementNS(SVG, tag), given, children);
  }

  function filled(node, given, children) {
    for (const [name, value] of Object.entries(given)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") styled(node, value);
      else if (name === "value" || name === "checked") node[name] = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  /** By properties, not by an attribute, which the page's policy forbids. */
  function styled(node, properties) {
    for (const [name, value] of Object.entries(properties)) node.style.setProperty(name, value);
    return node;
  }

  /** Buttons of which one is chosen; arrow keys move the choice. */
  function choice(label, options, chosen, onchange) {
    const buttons = options.map(([value, text]) =>
      el("button", { type: "button", role: "radio", onclick: () => pick(value) }, text),
    );
    const box = el("div", { class: "chips", role: "radiogroup", "aria-label": label }, buttons);
    box.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const at = buttons.findIndex((button) => button.getAttribute("aria-checked") === "true");
      const next = (Math.max(at, 0) + by + buttons.length) % buttons.length;
      buttons[next].focus();
      pick(options[next][0]);
    });
    function mark(value) {
      options.forEach(([own], i) => {
        buttons[i].setAttribute("aria-checked", String(own === value));
        buttons[i].tabIndex = own === value || (value === null && i === 0) ? 0 : -1;
      });
    }
    function pick(value) {
      mark(value);
      onchange(value);
    }
    mark(chosen);
    return Object.assign(box, { mark });
  }

  /** A labelled slider over whole numbers; `says` puts its value in words. */
  function slider({ label, min, max, value, says, oninput }) {
    const words = el("output", {}, says(value));
    const input = el("input", {
      type: "range",
      min,
      max,
      step: 1,
      value,
      disabled: min === max,
      "aria-label": label,
      "aria-valuetext": says(value),
      oninput: () => {
        set(Number(input.value));
        oninput(Number(input.value));
      },
    });
    function set(to) {
      input.value = to;
      words.textContent = says(to);
      input.setAttribute("aria-valuetext", says(to));
    }
    const box = el("label", { class: "slider" }, el("span", {}, label), input, words);
    return Object.assign(box, { set, input });
  }

  const note = (text, kind = "note") => el("p", { class: kind }, text);

  // --- figures in words ------------------------------------------------------------------------

  /** 1381760 as 1.38 M. */
  function short(n) {
    for (const [unit, size] of [
      ["T", 1e12],
      ["B", 1e9],
      ["M", 1e6],
      ["k", 1e3],
    ])
      if (Math.abs(n) >= size * 0.9995) return `${Number((n / size).toPrecision(3))} ${unit}`;
    return String(Number(n.toPrecision(3)));
  }

  /** Bytes in units of 1024. */
  function bytes(n) {
    for (const [unit, size] of [
      ["TiB", 2 ** 40],
      ["GiB", 2 ** 30],
      ["MiB", 2 ** 20],
      ["KiB", 1024],
    ])
      if (n >= size) return `${Number((n / size).toPrecision(3))} ${unit}`;
    return `${Math.round(n)} B`;
  }

  const whole = (n) => Math.round(n).toLocaleString("en-US");
  const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)} %`;
  const plural = (n, thing) => `${whole(n)} ${thing}${n === 1 ? "" : "s"}`;

  /** A token as one can see it: line breaks, tabs and other characters without a shape. */
  function visible(token, { blanks = false } = {}) {
    const shown = token.replaceAll("\r", "␍").replaceAll("\n", "↵").replaceAll("\t", "⇥");
    const safe = shown.replace(
      /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]/g,
      "·",
    );
    return blanks ? safe.replaceAll(" ", "␣") : safe;
  }

  // --- experts ---------------------------------------------------------------------------------

  /** The colour of an expert: eight that the colour-blind can tell apart, then shades of them. */
  function colour(expert) {
    const base = `var(--e${expert % 8})`;
    const shades = ["", "62%, var(--ink)", "52%, var(--paper)", "36%, var(--ink)"];
    const shade = shades[Math.floor(expert / 8) % 4];
    return shade ? `color-mix(in oklab, ${base} ${shade})` : base;
  }

  const swatch = (expert) =>
    el("i", { class: "swatch", style: { background: colour(expert) }, "aria-hidden": "true" });

  const FUTURE =
    "Here experts choose their tokens, and look at later ones to do so: what they predict they " +
    "have seen, " +
    "so neither samples nor statistics of this run would mean anything.";

  // --- state -----------------------------------------------------------------------------------

  const state = { run: 0, layer: 0, token: null };
  const bus = new EventTarget();

  function change(name, value) {
    state[name] = value;
    bus.dispatchEvent(new Event(name));
  }

  const on = (name, listener) => bus.addEventListener(name, listener);
  const card = (run = state.run) => overview.runs[run];

  return {
    overview,
    load,
    ask,
    stream,
    el,
    svg,
    styled,
    choice,
    slider,
    note,
    short,
    bytes,
    whole,
    percent,
    plural,
    visible,
    colour,
    swatch,
    FUTURE,
    state,
    change,
    on,
    card,
    panels: {},
  };
})();
