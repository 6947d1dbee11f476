"""The explorer as its visitor waits for it: the page, its first paint, the routing of a text."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nano_moe
from nano_moe import runs
from nano_moe.bench.recipes import prepared, recipe, text_folder
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK, Budget, Spread, interleave
from nano_moe.checkpoints import write_weights
from nano_moe.config import Recipe
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.text.store import Corpus

MODEL = "8 experts top-2"
NAME = "anchor"
WORDS = 300_000
TOKENS = 200
PAINT_TARGET, ROUTE_TARGET = 1000, 300  # ms
CHROMIUM = ("chromium", "chromium-browser")

NOTES = (
    "the anchor recipe's 8 experts top-2, weights as drawn, served by `nano-moe explore`.",
    "start: from the command to its whole page, imports included; page: of a running server; first "
    "paint: by the browser's own account, on an empty cache; route: of a text of some 200 tokens "
    "that is new to the server, from the request to its whole answer.",
)


def explore(quick: bool) -> Report:
    """Waits for one server of a run of that recipe, and for its start."""
    starts = Budget(0, min_rounds=1 if quick else 5, warm_up=0 if quick else 1)
    budget = QUICK if quick else Budget(seconds=20, min_rounds=10)
    with text_folder(WORDS // 10 if quick else WORDS) as (folder, data):
        chosen = recipe(MODEL, *data, quick=quick)
        corpus = prepared(chosen)
        _save(chosen, corpus, runs.create(chosen, stem=NAME, name=NAME, root=folder / runs.ROOT))
        started = interleave({"start": lambda number: _start(folder)}, starts)
        with _server(folder) as port:
            texts = _texts(corpus, min(TOKENS, chosen.model.context - 1))
            cases = {"page": lambda number: _page(port), "route": lambda _: _route(port, texts)}
            timings = interleave(cases, budget)
            painted = _first_paints(port, 2 if quick else 7)
    rows = [
        _row("start", started.spread("start"), None),
        _row("page", timings.spread("page"), None),
    ]
    if painted:
        rows.append(_row("first paint", Spread.of(painted), PAINT_TARGET))
    rows.append(_row("route", timings.spread("route"), ROUTE_TARGET))
    without = "first paint: not measured, for want of playwright or of a Chromium."
    return Report("Explorer", rows, NOTES if painted else (*NOTES, without))


def _row(wait: str, seconds: Spread, target: int | None) -> Row:
    met = None if target is None else seconds.median * 1e3 <= target
    return {"wait": wait, "ms": seconds.scaled(1e3), "target": target, "met": met}


def _save(chosen: Recipe, corpus: Corpus, run: runs.Run) -> None:
    """What the explorer reads of a trained run."""
    write_weights(run.best, chosen, init_weights(GPT(chosen.model), chosen.seed))
    corpus.tokenizer.save(run.tokenizer_file)
    runs.write_json(run.manifest_file, runs.describe(chosen, corpus=corpus, device="cpu"))


def _texts(corpus: Corpus, n_tokens: int) -> Iterator[str]:
    """Texts of about so many tokens, one after the other through the training split."""
    for start in itertools.count(0, n_tokens):
        lo = start % (len(corpus.train) - n_tokens)
        yield corpus.tokenizer.decode(corpus.train.tokens[lo : lo + n_tokens].tolist())


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, "-m", "nano_moe", "explore", NAME, "--no-browser"]
    package = str(Path(nano_moe.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://[\d.]+:(\d+)/", process.stdout.readline())
            if found is None:
                raise RuntimeError(f"{' '.join(command)}: {process.stderr.read()[-300:]}")
            yield int(found[1])
        finally:
            process.kill()


def _start(folder: Path) -> float:
    begun = time.perf_counter()
    with _server(folder) as port:
        _page(port)
        return time.perf_counter() - begun


def _page(port: int) -> None:
    _ask(port, "GET", "/", None)


def _route(port: int, texts: Iterator[str]) -> None:
    _ask(port, "POST", "/api/runs/0/route", json.dumps({"text": next(texts)}))


def _ask(port: int, method: str, path: str, body: str | None) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status}, {content[:300]!r}")


def _first_paints(port: int, n: int) -> list[float]:
    """Seconds from asking for the page to its first content, each in a fresh browser context."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return []
    from playwright.sync_api import sync_playwright

    painted = []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--headless=new"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for _ in range(n):
            with contextlib.closing(browser.new_context()) as context:
                page = context.new_page()
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_selector("#title:not(:empty)")
                painted.append(page.evaluate(PAINTED) / 1e3)
        browser.close()
    return painted


# Asked for until the browser has it: it is written down a moment after the paint itself.
PAINTED = """async () => {
  for (;;) {
    const [paint] = performance.getEntriesByName("first-contentful-paint");
    if (paint) return paint.startTime;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}"""
