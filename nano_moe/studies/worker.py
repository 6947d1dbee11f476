"""One run of a study: trained, resumed or measured in its folder, its figures in result.json.

A process of its own: `python -m nano_moe.studies.worker JOB`, JOB as JSON. It stops, with a
checkpoint, when the process that started it is gone.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nano_moe.accounting import count
from nano_moe.bench.machine import describe_machine
from nano_moe.checkpoints import load_model
from nano_moe.config import Recipe
from nano_moe.device import choose_precision
from nano_moe.errors import UserError
from nano_moe.evaluation import STARVED, Evaluation, evaluate
from nano_moe.memory import peak_resident, resident
from nano_moe.runs import Run, git_commit, versions, write_json
from nano_moe.studies import looks
from nano_moe.studies.exchanging import exchange
from nano_moe.studies.measure import measure
from nano_moe.studies.offloading import decode
from nano_moe.text.store import Corpus, prepare

RESULT = "result.json"
BALANCE = ("max_vio", "max_share", "dead_experts", "load_entropy")
IN_TRAINING = (*BALANCE, "dropped_share")


@dataclass(frozen=True)
class Job:
    """A run folder that holds its recipe, and what to do there."""

    folder: str
    key: str
    threads: int
    measure: bool
    look: str | None = None
    expert_budget: str | None = None
    expert_ranks: int | None = None

    @property
    def run(self) -> Run:
        return Run(Path(self.folder))

    @property
    def result(self) -> Path:
        return Path(self.folder) / RESULT

    @property
    def looked(self) -> Path:
        """What the look found."""
        return Path(self.folder) / f"{self.look}.json"

    @property
    def done(self) -> bool:
        return self.result.is_file() and (self.look is None or self.looked.is_file())


def work(job: Job) -> str | None:
    """Do what is left of a job and write it down; the signal that stopped it, or None."""
    torch.set_num_threads(job.threads)
    recipe, idle = job.run.recipe(), resident()
    if not job.result.is_file():
        found = _measure(job, recipe) if job.measure else _train(job, recipe, idle)
        if isinstance(found, str):
            return found
        write_json(job.result, {**_provenance(job, recipe), **found})
    if job.run.best.is_file():  # it holds the weights, and there is no going on
        job.run.last.unlink(missing_ok=True)
        job.run.previous.unlink(missing_ok=True)
    if job.look is not None:
        write_json(job.looked, looks.at(job.look, job.run, _corpus(recipe)))
    return None


def _measure(job: Job, recipe: Recipe) -> dict[str, Any]:
    if job.expert_ranks is not None:
        return exchange(recipe, job.expert_ranks)
    return measure(recipe) if job.expert_budget is None else decode(job.run, job.expert_budget)


def _corpus(recipe: Recipe) -> Corpus:
    return prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)


def _train(job: Job, recipe: Recipe, idle: int) -> dict[str, Any] | str:
    from nano_moe.training.fit import fit

    corpus = _corpus(recipe)
    watchers = looks.watchers(job.look, job.run, corpus)
    result = fit(
        job.run, recipe, corpus, resume=job.run.has_begun, progress=False, watchers=watchers
    )
    if result.stopped_by is not None:
        return result.stopped_by
    causal = recipe.model.is_causal
    scored = (result.evaluation or _score(job.run, recipe, corpus)) if causal else None
    return {
        "corpus": corpus.sha256,
        **(_scores(scored) if scored else {}),
        "seconds": round(result.seconds, 1),
        "memory_gb": (peak_resident() - idle) / 1e9,
        "curve": _curve(job.run),
        "balance": balance_of(job.run),
    }


def _scores(scored: Evaluation) -> dict[str, Any]:
    return {
        "ce": scored.overall.ce,
        "bpb": scored.overall.bpb,
        "domains": {name: score.bpb for name, score in scored.domains.items()},
        **_worst(scored.routing),
        "routing": [_layer(row) for row in scored.routing],
    }


def _score(run: Run, recipe: Recipe, corpus: Corpus) -> Evaluation:
    """Of a run that was killed between its last step and its result."""
    _, model, _ = load_model(run)
    precision = choose_precision(recipe)
    return evaluate(model, corpus, batch_size=recipe.trainer.batch_size, precision=precision)


def _worst(routing: list[dict[str, Any]]) -> dict[str, float]:
    """Each balance figure of the layer that is worst in it; dead and starved experts of all.

    Starved: with less than a tenth of an even share of the assignments.
    """
    if not routing:
        return {}
    worst: dict[str, Callable[[Iterable[float]], float]] = {
        "max_vio": max, "max_share": max, "dead_experts": sum, "load_entropy": min
    }  # fmt: skip
    found = {name: float(of(row[name] for row in routing)) for name, of in worst.items()}
    even = 1 / len(routing[0]["load"])
    starved = sum(share < STARVED * even for row in routing for share in row["load"])
    return {**found, "starved_experts": float(starved)}


def _layer(row: dict[str, Any]) -> dict[str, Any]:
    """A layer's balance figures, and each expert's share of all assignments."""
    load = [round(share, 5) for share in row["load"]]
    return {"layer": row["layer"], "load": load, **{name: row[name] for name in BALANCE}}


def _curve(run: Run) -> list[tuple[int, float]]:
    """(tokens, training cross-entropy) per logged interval: of tokens not seen before."""
    with open(run.metrics_file, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/ce"]]
    return [(int(row["tokens"]), round(float(row["train/ce"]), 4)) for row in rows]


def balance_of(run: Run) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(step, value) of each balance figure and layer, as training recorded them."""
    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for tag in events.Tags()["scalars"]:
        room, _, rest = tag.partition("/")
        layer, _, figure = rest.partition("/")
        if room == "moe" and figure in IN_TRAINING:
            series = [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]
            found.setdefault(figure, {})[layer.removeprefix("layer")] = series
    return found


def _provenance(job: Job, recipe: Recipe) -> dict[str, Any]:
    counted = count(recipe)
    return {
        "key": job.key,
        "seed": recipe.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "machine": describe_machine(),
        "versions": versions(),
        "tokens": recipe.trainer.steps * recipe.tokens_per_step,
        "parameters": {
            "total": counted.total_params,
            "active": counted.active_params,
            "router": counted.router_params,
        },
        "train_flops_per_token": counted.train_flops_per_token,
    }


def _stop_with_parent() -> None:
    """The starting process holds our stdin open; its end, however it comes, is an end of file."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock this thread would hold to the end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(argument: str) -> int:
    """Exit status 0 when the result is there, 128 + n when signal n stopped it."""
    _stop_with_parent()
    try:
        stopped_by = work(Job(**json.loads(argument)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if stopped_by is None else 128 + signal.Signals[stopped_by]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
