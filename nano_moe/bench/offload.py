"""Decoding with experts on disk: memory, hits and speed by the budget that stays in memory.

Of untrained weights, most of 1.8 GB in experts, and of a trained run where one is named, whose
router's habits decide the hits. Each budget is a process of its own, so that its memory is its own.
What is decoded is given: greedy, untrained weights repeat one token for ever, and so its experts.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nano_moe import recipe_file, runs
from nano_moe.bench.file_cache import MOST_LEFT, empty
from nano_moe.bench.offload_figure import draw
from nano_moe.bench.recipes import FOLDER, QUICK, RandomTokens, prepared
from nano_moe.bench.report import Report, Row
from nano_moe.checkpoints import load_model, write_weights
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.evaluation import spread_windows
from nano_moe.inference.decoding import Decoding
from nano_moe.inference.expert_file import EXPERTS, split_weights
from nano_moe.inference.offload import Counts, ExpertStore, Policy, load_offloaded
from nano_moe.memory import memory_of, return_freed_memory
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.runs import Run

LARGE = (
    "model.n_layers=8", "model.d_model=1024", "model.n_heads=16", "model.d_ff=2048",
    "model.moe.n_experts=16",
)  # fmt: skip
SMALL = (*QUICK, "model.n_layers=4")
SHARES = (10, 25, 50, 75, 100)  # per cent; 12.5 would hold one token's experts in every layer
VARIANTS: tuple[dict[str, Any], ...] = (
    {"prefetch": False}, {"policy": "lfu"}, {"policy": "lfu", "prefetch": False},
)  # fmt: skip
PROMPT, UNTIMED, TOKENS = 8, 2, 48
NOTES = (
    "anonymous, from files: growth of resident memory by the model and decoding; the system's own "
    "cache of the file is not in it.",
    "cold: before every token the system's cache of the file is emptied; warm: the file is read "
    "once before. No budget: all experts in the decoder itself, and no file.",
    f"still cached: the share of the file that stayed when its cache was emptied. Above "
    f"{MOST_LEFT:.0%} cold is not measured: the file is in memory itself (tmpfs; TMPDIR names "
    "another folder for untrained weights), or another process has it mapped.",
    "hits: calls for an expert that found it in memory, or on its way there; waited: hits that "
    "still had to wait for it.",
)


@dataclass(frozen=True)
class Case:
    """One budget of one run (None: all experts in the decoder itself), and the tokens it reads."""

    folder: str
    text: Sequence[int]  # the first PROMPT of them at once
    budget: str | None
    policy: Policy = "lru"
    prefetch: bool = True
    cold: bool = False
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)


def offload(quick: bool, run: str | None = None) -> Report:
    named = [] if run is None else [runs.find(run)]
    trained = [(one, shares_of(one), _validation_text(one)) for one in named]  # their faults first
    per_run: list[list[Row]] = []
    with tempfile.TemporaryDirectory(prefix="nano-moe-offload-") as folder:
        untrained = _untrained(Path(folder), quick)
        drawn = (untrained, shares_of(untrained), drawn_text(untrained.recipe()))
        for one, shares, text in (drawn, *trained):
            rows = [_row(one, text, budget=None)]
            rows += [_row(one, text, budget=f"{share}%") for share in shares]
            rows += [_row(one, text, budget="50%", **changes) for changes in VARIANTS]
            per_run.append(rows)
    return Report("experts on disk", list(chain(*per_run)), NOTES, figure=draw(per_run))


def shares_of(run: Run) -> list[float]:
    """The SHARES that hold one token's experts; makes the files that all of them read."""
    file, _, _ = split_weights(run)
    moe = run.recipe().model.moe
    assert moe is not None
    return [share for share in SHARES if share / 100 * len(file.keys) >= moe.top_k]


def _untrained(folder: Path, quick: bool) -> Run:
    recipe = recipe_file.load(FOLDER / "mixtral.yaml", SMALL if quick else LARGE)
    run = runs.create(recipe, stem="untrained", root=folder)
    draw_weights(run)
    return run


def draw_weights(run: Run) -> None:
    """Write a checkpoint of the run's recipe with weights as drawn from its seed."""
    recipe = run.recipe()
    write_weights(run.best, recipe, init_weights(GPT(recipe.model), recipe.seed))


def drawn_text(recipe: Recipe) -> list[int]:
    """As many drawn tokens as a case reads, other ones for another seed."""
    return RandomTokens(recipe)(recipe.seed)[0].tolist()[: _length(recipe)]


def _validation_text(run: Run) -> list[int]:
    recipe = run.recipe()
    corpus = prepared(recipe)
    runs.check_corpus(run, corpus)
    return spread_windows(corpus, recipe.model.context, 1)[0][0].tolist()[: _length(recipe)]


def _length(recipe: Recipe) -> int:
    return min(PROMPT + UNTIMED + TOKENS, recipe.model.context)


def _row(run: Run, text: Sequence[int], **changes: Any) -> Row:
    """A budget, with a warm and with a cold cache of the file."""
    case = Case(str(run.path), text, **changes)
    warm = _apart(case)
    cold = _apart(dataclasses.replace(case, cold=True)) if case.budget else warm
    was_cold = (cold["still cached"] or 0) <= MOST_LEFT
    ahead = ", read ahead" if case.prefetch else ""
    return {
        "run": run.name,
        "budget": case.budget or "none",
        "policy": f"{case.policy}{ahead}" if case.budget else None,
        **{name: value for name, value in warm.items() if name not in ("tokens/s", "still cached")},
        "tokens/s, warm": warm["tokens/s"],
        "tokens/s, cold": cold["tokens/s"] if was_cold else None,
        "still cached": cold["still cached"],
    }


def _apart(case: Case) -> dict[str, Any]:
    """Measured in a process of its own."""
    command = [sys.executable, "-m", "nano_moe.bench.offload", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench offload: {(done.stderr.strip().splitlines() or ['died'])[-1]}")
    return json.loads(done.stdout)


def measure(case: Case) -> Row:
    """Reading the text token by token in this process."""
    torch.set_num_threads(case.threads)
    _compile_kernels()
    return_freed_memory()
    before = {field: memory_of(field) for field in ("RssAnon", "RssFile")}
    model, store = _load(case)
    file = Path(case.folder) / EXPERTS
    if store and not case.cold:
        file.read_bytes()
    decoding = Decoding(model, [case.text[:PROMPT]])
    decoding.next_logits()
    for token in case.text[PROMPT : PROMPT + UNTIMED]:
        decoding.append([token], [True])
        decoding.next_logits()
    if store:
        store.wait()
        store.count_anew()
    seconds, left = 0.0, list[float]()
    timed = case.text[PROMPT + UNTIMED :]
    for token in timed:
        decoding.append([token], [True])
        if store and case.cold:
            store.wait()
            left.append(empty(file))
        start = time.perf_counter()
        decoding.next_logits()
        seconds += time.perf_counter() - start
    since = store.counts if store else Counts(0, 0, 0, 0, 0)
    return {
        "experts, GB": _expert_bytes(model, store) / 1e9,
        "anonymous, GB": (memory_of("RssAnon") - before["RssAnon"]) / 1e9,
        "from files, GB": (memory_of("RssFile") - before["RssFile"]) / 1e9,
        "hits": since.hit_rate if store else 1.0,
        "waited": since.waited / max(1, since.hits),
        "guesses right": since.guessed_right / since.guessed if since.guessed else None,
        "tokens/s": len(timed) / seconds,
        "still cached": sum(left) / len(left) if left else None,
    }


def _compile_kernels() -> None:
    """A machine's first decoding compiles for seconds, in memory that is not the model's."""
    small = recipe_file.load(FOLDER / "mixtral.yaml", SMALL)
    decoding = Decoding(init_weights(GPT(small.model), small.seed).eval(), [[0, 1]])
    for _ in range(2):
        decoding.next_logits()
        decoding.append([0], [True])


def _load(case: Case) -> tuple[GPT, ExpertStore | None]:
    run = Run(Path(case.folder))
    if case.budget is None:
        return load_model(run)[1], None
    _, model, _, store = load_offloaded(
        run, case.budget, policy=case.policy, prefetch=case.prefetch
    )
    return model, store


def _expert_bytes(model: GPT, store: ExpertStore | None) -> int:
    """Of the experts that are in memory at most."""
    if store:
        return store.first.nbytes + store.down.nbytes
    return sum(w.nbytes for name, w in model.named_parameters() if ".experts." in name)


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
