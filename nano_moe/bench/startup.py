"""What training costs besides its steps: the trainer around them, and the wait for the first."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nano_moe
from nano_moe import recipe_file, runs
from nano_moe.bench.bare import BareStep
from nano_moe.bench.recipes import prepared, recipe, text_folder
from nano_moe.bench.report import Row
from nano_moe.bench.timing import Budget, Case, Spread, Timings, interleave
from nano_moe.config import Recipe
from nano_moe.text.store import Corpus
from nano_moe.training.data import Windows
from nano_moe.training.fit import fit
from nano_moe.training.module import Decoder
from nano_moe.training.step_callback import StepCallback
from nano_moe.training.telemetry import Telemetry

OVERHEAD_TARGET = 1.03  # of a bare loop's time
LOGGING_TARGET = 0.02  # of the time of all steps, every tenth of them writing its row
START_TARGET = 8.0  # seconds
HELP, HELP_TARGET = "--help", 1.0
LONGEST_START = 120.0  # seconds until a start counts as failed
MODEL = "8 experts top-2"  # its telemetry has more to write than a dense model's
WORDS = 300_000
NEVER = ("trainer.val_every=1000000", "trainer.save_every=1000000")


# --- the trainer ---------------------------------------------------------------------------------


def overhead(quick: bool) -> Iterator[Row]:
    """A step of `fit`, with all its callbacks, against the same step in a bare loop."""
    n_steps, skipped = (12, 2) if quick else (65, 5)
    with text_folder(WORDS // 10 if quick else WORDS) as (folder, data):
        changes = (*data, *NEVER, f"trainer.steps={n_steps}", "optim.warmup_steps=0")
        chosen = recipe(MODEL, *changes, quick=quick)
        corpus = prepared(chosen)
        bare = _bare(chosen, corpus)
        watch = Alternate(bare)
        run = runs.create(chosen, stem="overhead", root=folder / "checkpoints")
        with timed_logging() as logging:
            fit(run, chosen, corpus, progress=False, watchers=[lambda _: watch])
    timings = Timings({name: times[skipped:] for name, times in watch.seconds.items()})
    ratio = timings.ratio("fit", "bare loop")
    yield {
        "trainer": MODEL,
        "fit ms": timings.spread("fit").scaled(1e3),
        "bare loop ms": timings.spread("bare loop").scaled(1e3),
        "ratio": ratio,
        "target": OVERHEAD_TARGET,
        "met": ratio.median <= OVERHEAD_TARGET,
        "rounds": timings.rounds,
    }
    took = logging[1 + skipped : n_steps - 1]  # of the steps that were timed
    rows = [seconds for step, seconds in took if step % chosen.trainer.log_every == 0]
    share = sum(seconds for _, seconds in took) / sum(timings.seconds["fit"])
    yield {
        "logging": MODEL,
        "ms of a row": round(1e3 * statistics.median(rows), 2) if rows else None,
        "every steps": chosen.trainer.log_every,
        "share of training": round(share, 4),
        "target": LOGGING_TARGET,
        "met": share <= LOGGING_TARGET,
    }


@contextmanager
def timed_logging() -> Iterator[list[tuple[int, float]]]:
    """Step and seconds of each call of the telemetry, whether it writes a row or only sums up."""
    calls: list[tuple[int, float]] = []
    plain = Telemetry.on_train_batch_end

    def timed(self: Telemetry, trainer: Any, *rest: Any) -> None:
        start = time.perf_counter()
        plain(self, trainer, *rest)
        calls.append((trainer.global_step, time.perf_counter() - start))

    with patch.object(Telemetry, "on_train_batch_end", timed):
        yield calls


class Alternate(StepCallback):
    """Takes a step of a bare loop, on its own weights, after each step of the trainer.

    The trainer's time is all between two bare steps: its loop, its callbacks, its data.
    """

    def __init__(self, bare: BareStep):
        self.bare = bare
        self.seconds: dict[str, list[float]] = {"fit": [], "bare loop": []}
        self._left: float | None = None  # when the trainer got its turn

    def on_step_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        arrived = time.perf_counter()
        if trainer.global_step == trainer.max_steps:
            return  # the last step is followed by a validation and a checkpoint, which are not ours
        start = time.perf_counter()
        self.bare.run(trainer.global_step)
        end = time.perf_counter()
        if self._left is not None:
            self.seconds["fit"].append(arrived - self._left)
            self.seconds["bare loop"].append(end - start)
        self._left = time.perf_counter()


def _bare(chosen: Recipe, corpus: Corpus) -> BareStep:
    """A loop over the same windows as the trainer's."""
    import torch

    windows, size = Windows(corpus, chosen), chosen.trainer.batch_size

    def batch(number: int) -> torch.Tensor:
        return torch.stack([windows[number * size + i] for i in range(size)])

    return BareStep(Decoder(chosen), batch)


# --- the start -----------------------------------------------------------------------------------


def start_up(quick: bool) -> Iterator[Row]:
    """Seconds from `train` as a command to its first optimizer step, the text being prepared.

    And those of a command that trains nothing.
    """
    budget = Budget(0, min_rounds=1 if quick else 5, warm_up=0 if quick else 1)
    with text_folder(WORDS // 10 if quick else WORDS) as (folder, data):
        chosen = recipe(MODEL, *data, *NEVER, "trainer.log_every=1", quick=quick)
        prepared(chosen)
        (folder / "anchor.yaml").write_text(recipe_file.dump(chosen), encoding="utf-8")
        cases: dict[str, Case] = {MODEL: lambda _: _first_step(folder), HELP: lambda _: _help()}
        timings = interleave(cases, budget)
    for name, target in ((MODEL, START_TARGET), (HELP, HELP_TARGET)):
        spread: Spread = timings.spread(name)
        yield {
            "start-up": name,
            "seconds": spread,
            "target": target,
            "met": spread.median <= target,
            "rounds": timings.rounds,
        }


def _help() -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "nano_moe", HELP]
    subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _environment() -> dict[str, str]:
    """Ours, and that finds this package from any folder."""
    package = str(Path(nano_moe.__file__).parent.parent)
    paths = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths}


def _first_step(folder: Path) -> float:
    """Start a training and end it as soon as its first row of metrics is there."""
    command = [sys.executable, "-m", "nano_moe", "train", "anchor.yaml"]
    env = _environment()
    before = set(folder.glob("checkpoints/*"))
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            while not _has_row(set(folder.glob("checkpoints/*")) - before):
                if process.poll() is not None or time.perf_counter() - start > LONGEST_START:
                    break
                time.sleep(0.01)
            else:
                return time.perf_counter() - start
        finally:
            process.kill()
        _, err = process.communicate()
    raise RuntimeError(f"{' '.join(command)}: no first step; it said: {err.decode()[-300:]}")


def _has_row(new: set[Path]) -> bool:
    files = [path / "metrics.csv" for path in new]
    return any(file.exists() and file.read_bytes().count(b"\n") > 1 for file in files)
