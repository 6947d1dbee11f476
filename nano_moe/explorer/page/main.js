"use strict";
// The frame: which run, which theme, and panels that begin when they come into view.

(() => {
  const { el, overview, state } = X;
  const seen = new Set();
  const shown = new Map();

  function begin() {
    theme();
    if (overview.runs.length > 1) {
      const options = overview.runs.map((run, i) => [i, run.name]);
      document.getElementById("runs").replaceWith(X.choice("Run", options, 0, open));
    }
    document
      .getElementById("foot")
      .replaceChildren(
        el(
          "p",
          { class: "dim" },
          `nano_moe ${overview.version}. Experts and layers count from 0, as in the logs. `,
          overview.live
            ? "Nothing leaves this machine."
            : `Made by report-html. Live: ${overview.command}`,
        ),
      );
    watch();
    open(0);
  }

  function open(run) {
    state.run = run;
    state.token = null;
    state.layer = Math.min(state.layer, Math.max(0, X.card(run).layers.length - 1));
    document.getElementById("title").textContent = X.card(run).name;
    document.getElementById("facts").textContent = facts(X.card(run));
    document.title = `${X.card(run).name} · nano_moe explorer`;
    for (const name of seen) show(name);
  }

  function facts(card) {
    const { short, plural } = X;
    const words = [];
    if (card.layers.length) {
      const where =
        card.layers.length === card.n_layers
          ? `each of ${card.n_layers} layers`
          : `${card.layers.length} of ${card.n_layers} layers`;
      const besides = card.n_shared ? `, beside ${plural(card.n_shared, "shared one")}` : "";
      const visits = card.causal
        ? `a token visits ${card.top_k} of ${card.n_experts} experts in ${where}${besides}`
        : `in ${where}, ${card.n_experts} experts choose their tokens, later ones among them`;
      words.push(
        `${visits[0].toUpperCase()}${visits.slice(1)}.`,
        `${short(card.total)} parameters, ${short(card.active)} of them per token.`,
        `Balanced by: ${card.balancing}.`,
      );
    } else
      words.push(
        `Dense: ${card.n_layers} layers, ${short(card.total)} parameters, all for every token.`,
      );
    if (card.ce !== null)
      words.push(
        `Validation cross-entropy ${card.ce.toFixed(3)} nats after ${X.whole(card.step)} steps.`,
      );
    return words.join(" ");
  }

  /** Draw a panel for the current run, unless it shows that one. */
  async function show(name) {
    const panel = X.panels[name];
    const run = panel.once ? 0 : state.run;
    if (shown.get(name) === run) return;
    shown.set(name, run);
    const body = document.querySelector(`#${name} .body`);
    body.setAttribute("aria-busy", "true");
    try {
      await panel.show(run, body);
    } catch (error) {
      if (shown.get(name) !== run) return;
      body.replaceChildren(X.note(error.message, "fault"));
      shown.delete(name); // to be tried again
    }
    body.removeAttribute("aria-busy");
  }

  /** A panel comes into view, perhaps for the first time. */
  function come(name) {
    if (seen.has(name)) return;
    seen.add(name);
    show(name);
  }

  function watch() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
    for (const [name, link] of links) link.addEventListener("click", () => come(name));
    const near = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) if (isIntersecting) come(target.id);
      },
      { rootMargin: "300px" },
    );
    const there = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) {
          const link = links.get(target.id);
          link.toggleAttribute("aria-current", isIntersecting);
          if (isIntersecting) link.parentNode.scrollLeft = link.offsetLeft - 60; // where narrow
        }
      },
      { rootMargin: "-45% 0px -50% 0px" },
    );
    for (const section of document.querySelectorAll("main section")) {
      near.observe(section);
      there.observe(section);
    }
  }

  function theme() {
    const button = document.getElementById("theme");
    const root = document.documentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let kept = null;
    try {
      kept = localStorage.getItem("nano_moe theme");
    } catch {
      /* a file opened from disk may have no storage */
    }
    const set = (name) => {
      root.dataset.theme = name;
      button.textContent = name === "dark" ? "☀ Light" : "☾ Dark";
    };
    const follow = () => set(kept ?? (dark.matches ? "dark" : "light"));
    dark.addEventListener("change", follow);
    button.addEventListener("click", () => {
      kept = root.dataset.theme === "dark" ? "light" : "dark";
      try {
        localStorage.setItem("nano_moe theme", kept);
      } catch {
        /* then for this visit alone */
      }
      follow();
    });
    follow();
  }

  begin();
})();
