"""Decoding with experts on disk: memory, hits and speed by the budget that stays in memory.

Of untrained weights, most of 1.7 GB in experts, and of a trained run where one is named: routers
that learned call the same experts again, untrained ones hardly do. Each budget is a process of its
own, so that its memory is its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nano_moe import recipe_file, runs
from nano_moe.bench.recipes import FOLDER, QUICK
from nano_moe.bench.report import Report, Row
from nano_moe.errors import UserError
from nano_moe.inference.decoding import Decoding
from nano_moe.inference.expert_file import EXPERTS, split_weights
from nano_moe.inference.offload import Counts, Policy, load_offloaded
from nano_moe.memory import memory_of
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.runs import SCHEMA, Run

LARGE = (
    "model.n_layers=8", "model.d_model=1024", "model.n_heads=16", "model.d_ff=2048",
    "model.moe.n_experts=16",
)  # fmt: skip
SMALL = (*QUICK, "model.n_layers=4")
SHARES = (12.5, 25, 50, 75, 100)  # per cent; 12.5 holds one token's experts in every layer
VARIANTS: tuple[dict[str, Any], ...] = (
    {"prefetch": False}, {"policy": "lfu"}, {"policy": "lfu", "prefetch": False},
)  # fmt: skip
TOKENS, PROMPT = 48, 8
NOTES = (
    "anonymous, from files: growth of resident memory by the model and decoding; the system's own "
    "cache of the file is not in it.",
    "cold: before every token the system's cache of the file is emptied; warm: the file is read "
    "once before. Greedy, one prompt.",
    "hits: calls for an expert that found it in memory, or on its way there.",
)


@dataclass(frozen=True)
class Case:
    """One budget of one run."""

    folder: str
    tokens: int
    budget: str
    policy: Policy = "lru"
    prefetch: bool = True
    cold: bool = False
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)


def offload(quick: bool, run: str | None = None) -> Report:
    trained = [] if run is None else [runs.find(run)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="nano-moe-offload-") as folder:
        for one in (_untrained(Path(folder), quick), *trained):
            split_weights(one)
            rows += [_row(one, quick, budget=f"{share}%") for share in SHARES]
            rows += [_row(one, quick, budget="50%", **changes) for changes in VARIANTS]
    return Report("experts on disk", rows, NOTES)


def _untrained(folder: Path, quick: bool) -> Run:
    recipe = recipe_file.load(FOLDER / "mixtral.yaml", SMALL if quick else LARGE)
    run = runs.create(recipe, stem="untrained", root=folder)
    model = init_weights(GPT(recipe.model), recipe.seed)
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    checkpoint = {"nano_moe": {"schema": SCHEMA}, "state_dict": state, "global_step": 0}
    torch.save(checkpoint, run.best)
    return run


def _row(run: Run, quick: bool, **changes: Any) -> Row:
    """A budget, with a warm and with a cold cache of the file."""
    case = Case(str(run.path), tokens=8 if quick else TOKENS, **changes)
    warm, cold = (_apart(dataclasses.replace(case, cold=cold)) for cold in (False, True))
    ahead = ", read ahead" if case.prefetch else ""
    return {
        "run": run.name,
        "budget": case.budget,
        "policy": f"{case.policy}{ahead}",
        **{name: value for name, value in warm.items() if name != "tokens/s"},
        "tokens/s, warm": warm["tokens/s"],
        "tokens/s, cold": cold["tokens/s"],
    }


def _apart(case: Case) -> Row:
    """Measured in a process of its own."""
    command = [sys.executable, "-m", "nano_moe.bench.offload", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench offload: {(done.stderr.strip().splitlines() or ['died'])[-1]}")
    return json.loads(done.stdout)


def measure(case: Case) -> Row:
    """Greedy decoding of one prompt in this process."""
    torch.set_num_threads(case.threads)
    before = {field: memory_of(field) for field in ("RssAnon", "RssFile")}
    run = Run(Path(case.folder))
    _, model, _, store = load_offloaded(
        run, case.budget, policy=case.policy, prefetch=case.prefetch
    )
    file = run.path / EXPERTS
    if not case.cold:
        file.read_bytes()
    decoding = Decoding(model, [range(1, PROMPT + 1)])
    decoding.append([int(decoding.next_logits().argmax())], [True])
    begun = store.counts
    seconds = 0.0
    for _ in range(case.tokens):
        if case.cold:
            _empty_cache(file)
        start = time.perf_counter()
        token = int(decoding.next_logits().argmax())
        seconds += time.perf_counter() - start
        decoding.append([token], [True])
    since = Counts(*(now - before for now, before in zip(store.counts, begun, strict=True)))
    return {
        "experts, GB": store.first.nbytes / 1e9 + store.down.nbytes / 1e9,
        "anonymous, GB": (memory_of("RssAnon") - before["RssAnon"]) / 1e9,
        "from files, GB": (memory_of("RssFile") - before["RssFile"]) / 1e9,
        "hits": since.hit_rate,
        "guesses right": since.guessed_right / since.guessed if since.guessed else None,
        "tokens/s": case.tokens / seconds,
    }


def _empty_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
