"""Whole training steps of our decoder against other libraries' decoders of the same shape.

Every side runs in a process of its own (`peer_worker.py`), in the interpreter that has its library;
all are asked in turn, one at a time, so only one computes. Optimizer, precision, batch, vocabulary
and parameter count are the same. A peer that has a choice (how it dispatches to experts, attends)
measures that first, and runs with the fastest.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nano_moe.bench import recipes
from nano_moe.bench.peer_process import Peer, PeerFault
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK, Budget, Timings, interleave
from nano_moe.config import Recipe
from nano_moe.errors import UserError

PRECISIONS = ("fp32", "bf16")
ROUNDS = Budget(seconds=10, min_rounds=4, warm_up=0)  # every side has taken steps before
A_LOOK = Budget(seconds=1.5, min_rounds=1, warm_up=0)  # where one step takes less than this
A_TURN = 0.4  # seconds of steps that a side takes before the next one's turn
TOO_SLOW = 5.0  # a choice this many times slower than the best so far is not tried again
LITGPT = "litgpt==0.5.13"
ENVIRONMENT = (
    "litgpt needs an environment of its own, since its pins exclude ours: python3 -m venv "
    f"litgpt-env && litgpt-env/bin/pip install torch=={torch.__version__.partition('+')[0]} "
    f"{LITGPT}; then name it: LITGPT_PYTHON=litgpt-env/bin/python"
)
NOTES = (
    "ours / peer: our tokens per second over the peer's, within a round; above 1 we are faster.",
    "A step: forward, loss, backward, torch.optim.AdamW(fused=True), zero_grad; float32 weights, "
    "bf16 under autocast; gradients are not clipped, nothing goes through torch.compile. Every "
    "side's C library keeps freed memory, as in our training.",
    "The load-balancing loss is in ours and transformers'; litgpt has none, ours keeps it there.",
    "Choices: each in turn beside the best of those before; a peer runs with those taken.",
)


class Shape(NamedTuple):
    """One of recipes.DECODERS, its changes, and the least ratio we aim at."""

    name: str
    decoder: str
    changes: tuple[str, ...]
    targets: Mapping[str, float]


NEVER_SLOWER = {"transformers": 1.0, "litgpt": 1.0}
NANOGPT = ("model.context=64", "trainer.batch_size=12", "model.d_ff=512", "model.qk_norm=false")
WIDE = ("model.d_model=384", "model.n_heads=6", "model.d_ff=1536", "model.n_layers=2")
SHAPES = (
    Shape("anchor, 8 experts top-2", "8 experts top-2", (), NEVER_SLOWER),
    Shape("nanoGPT's, 8 experts top-2", "8 experts top-2", NANOGPT, NEVER_SLOWER),
    Shape(
        "D 384, 64 experts top-8",
        "64 experts top-8",
        (*WIDE, "trainer.batch_size=32"),
        NEVER_SLOWER | {"transformers": 1.2},
    ),
    Shape("anchor, dense", "dense", ("model.qk_norm=false",), NEVER_SLOWER),
)


@dataclass
class Contest:
    """The sides of one shape: those in it, what they said of themselves, why others are out."""

    shape: Shape
    recipe: Recipe
    sides: dict[str, Peer] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)

    def drop(self, fault: PeerFault) -> None:
        """Goes on without that side; raises UserError where it is ours."""
        if fault.side == "ours":
            raise UserError(f"{self.shape.name}: our own side failed: {fault}")
        self.out[fault.side] = str(fault)
        self.sides.pop(fault.side).stop()  # it might still be computing

    def each(self, ask: Callable[[str, Peer], None]) -> None:
        """Asks the sides one after the other, and drops those that have a fault."""
        for side, peer in list(self.sides.items()):
            try:
                ask(side, peer)
            except PeerFault as fault:
                self.drop(fault)


def peers(quick: bool, litgpt_python: str | None = None) -> Report:
    """A row per shape, precision and peer, then one for each value that a peer had to choose from.

    Raises UserError where `litgpt_python` is no interpreter or has no litgpt.
    """
    interpreters = find_interpreters(litgpt_python)
    rows: list[Row] = []
    tried: list[Row] = []
    for shape in SHAPES:
        with contest(shape, interpreters, quick) as entered:
            for precision in PRECISIONS:
                tried += choose(entered, precision, quick)
                rows += compare(entered, precision, quick)
    return Report("Training steps against other libraries", [*rows, *tried], NOTES)


def find_interpreters(litgpt_python: str | None) -> dict[str, str | None]:
    """Each side's interpreter, None where there is none; raises UserError."""
    if litgpt_python is not None:
        check_litgpt(litgpt_python)
    has_transformers = importlib.util.find_spec("transformers") is not None
    return {
        "ours": sys.executable,
        "transformers": sys.executable if has_transformers else None,
        "litgpt": litgpt_python,
    }


def check_litgpt(python: str) -> None:
    """Before minutes of timing: raises UserError where it could not be run."""
    if shutil.which(python) is None:
        raise UserError(f"--litgpt-python {python}: no such program; {ENVIRONMENT}")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('litgpt') is None)"
    if subprocess.run([python, "-c", look], capture_output=True).returncode:
        remedy = f"run: {python} -m pip install {LITGPT}"
        raise UserError(f"--litgpt-python {python}: no Python that has litgpt; {remedy}")


@contextlib.contextmanager
def contest(shape: Shape, interpreters: Mapping[str, str | None], quick: bool) -> Iterator[Contest]:
    """Starts all sides of a shape, and ends their processes; raises UserError as `drop` does."""
    changes = (*shape.changes, *(recipes.QUICK if quick else ()))
    recipe = recipes.recipe(shape.decoder, *changes, quick=False)
    entered = Contest(shape, recipe)
    with contextlib.ExitStack() as processes:
        for side, python in interpreters.items():
            if python is None:
                entered.out[side] = HOW_TO_HAVE[side]
            else:
                peer = Peer(side, python, job(recipe))
                entered.sides[side] = processes.enter_context(peer)
        entered.each(lambda side, peer: entered.about.update({side: peer.wait()}))
        check_parameters(entered)
        yield entered


HOW_TO_HAVE = {
    "transformers": "it is not installed; run: pip install 'nano-moe[export]'",
    "litgpt": ENVIRONMENT,
}


def job(recipe: Recipe) -> dict[str, Any]:
    """What a worker needs to know of a recipe."""
    model = recipe.model.model_dump(mode="json")
    if recipe.model.moe is not None:
        model["moe"]["d_expert"] = recipe.model.expert_width
    batch_size, threads = recipe.trainer.batch_size, torch.get_num_threads()
    return {"model": model, "batch_size": batch_size, "threads": threads}


def check_parameters(entered: Contest) -> None:
    """Equal shapes hold equally many parameters."""
    counts = {side: about["parameters"] for side, about in entered.about.items()}
    assert len(set(counts.values())) == 1, f"{entered.shape.name}: parameters differ, {counts}"


def choose(entered: Contest, precision: str, quick: bool) -> list[Row]:
    """Leaves every side at the fastest of its choices; a row for each value."""
    rows: list[Row] = []

    def ask(side: str, peer: Peer) -> None:
        where: Row = {"shape": entered.shape.name, "precision": precision, "peer": side}
        tried = try_choices(peer, entered.about[side], precision, quick)
        rows.extend(where | row for row in tried)

    entered.each(ask)
    return rows


def try_choices(peer: Peer, about: dict[str, Any], precision: str, quick: bool) -> list[Row]:
    """One choice after the other, each beside the best of those before; raises PeerFault."""
    rows: list[Row] = []
    taken = {choice: values[0] for choice, values in about["choices"].items()}
    with contextlib.suppress(PeerFault):  # which shows again below
        step_with(peer, precision, taken)(0)  # the first in a precision is slow
    for choice, values in about["choices"].items():
        refused = about["refused"].get(choice, {}).copy()  # value -> why
        cases = {v: step_with(peer, precision, taken | {choice: v}) for v in values}
        once = weed_out(peer, cases, refused, precision)
        timings = Timings({value: [seconds] for value, seconds in once.items()})
        if min(once.values()) < A_LOOK.seconds:
            left = {value: cases[value] for value in once}
            timings = interleave(left, QUICK if quick else A_LOOK)
        taken[choice] = timings.fastest(list(once))
        for value in values:
            ms = timings.spread(value).scaled(1e3) if value in once else None
            found: Row = {"choice": f"{choice}={value}", "ms": ms, "taken": value == taken[choice]}
            rows.append(found | {"because": refused.get(value)})
    peer.use(precision, taken)
    return rows


def step_with(peer: Peer, precision: str, choices: Mapping[str, str]) -> Callable[[int], float]:
    """Seconds of one step so."""

    def step(number: int) -> float:
        peer.use(precision, choices)
        return peer.steps(1)[0]

    return step


def weed_out(
    peer: Peer, cases: Mapping[str, Callable[[int], float]], refused: dict[str, str], precision: str
) -> dict[str, float]:
    """Seconds of a first step with each value that neither has a fault nor is far too slow.

    Adds the others to `refused`, with the reason; raises PeerFault if none is left.
    """
    once: dict[str, float] = {}
    for value in [value for value in cases if value not in refused]:
        try:
            seconds = cases[value](0)
        except PeerFault as fault:
            refused[value] = str(fault)
            continue
        best = min(once.values(), default=math.inf)
        if seconds > TOO_SLOW * best:
            refused[value] = f"{seconds / best:.0f} times slower in {precision}"
        else:
            once[value] = seconds
    if not once:
        raise PeerFault(peer.side, "; ".join(refused.values()))
    return once


def compare(entered: Contest, precision: str, quick: bool) -> list[Row]:
    """A row for each peer, measured or not."""
    timings = measure(entered, quick)
    return [row_of(entered, side, precision, timings) for side in entered.shape.targets]


def measure(entered: Contest, quick: bool) -> Timings:
    """Seconds per step of all sides that last to the end."""
    while True:
        try:
            steps = 1 if quick else turn(entered.sides["ours"].steps(1)[0])
            cases = {side: in_turn(peer, steps) for side, peer in entered.sides.items()}
            return interleave(cases, QUICK if quick else ROUNDS)
        except PeerFault as fault:
            entered.drop(fault)


def turn(seconds_per_step: float) -> int:
    """Steps in one turn."""
    return max(1, round(A_TURN / seconds_per_step))


def in_turn(peer: Peer, steps: int) -> Callable[[int], float]:
    """Seconds per step of a turn."""
    return lambda number: sum(peer.steps(steps)) / steps


def row_of(entered: Contest, side: str, precision: str, timings: Timings) -> Row:
    is_in = side in entered.sides
    ratio = timings.ratio(side, "ours") if is_in else None
    target = entered.shape.targets[side]
    tokens = entered.recipe.tokens_per_step
    return {
        "shape": entered.shape.name,
        "precision": precision,
        "peer": entered.about[side]["name"] if is_in else side,
        "ours tokens/s": round(tokens / timings.spread("ours").median),
        "peer tokens/s": round(tokens / timings.spread(side).median) if is_in else None,
        "ours / peer": ratio,
        "target": target,
        "met": ratio.median >= target if ratio is not None else None,
        "rounds": timings.rounds,
        "not measured": entered.out.get(side),
    }
