"""The optimizer's step alone, and how much of it Muon's iteration takes.

Shapes: S matrices of one shape (m, n).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from nano_moe.bench.recipes import DECODERS, recipe
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK, Budget, Case, Timings, interleave
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.training import optimizers
from nano_moe.training.optimizers import MuonAdamW, newton_schulz, parameter_groups

STEP, ITERATION = "MuonAdamW step", "of which Newton-Schulz"
SINGLE = "Newton-Schulz, matrix by matrix"
ADAMW = ("fused", "foreach")

NOTES = (
    "of step: time over that of a whole MuonAdamW step in the same precision (AdamW works in "
    "fp32); all ratios within a round.",
    "Newton-Schulz is the iteration inside of the step, in batches; matrix by matrix: the same "
    "matrices one at a time.",
    "bf16: Muon's iteration alone (optim.newton_schulz); weights, gradients and state are fp32.",
)


def optimizer(quick: bool) -> Report:
    budget = QUICK if quick else Budget(seconds=10)
    rows: list[Row] = []
    for name in DECODERS:
        cases = {**_muon(name, quick), **_adamw(name, quick)}
        timings = interleave({", ".join(key): case for key, case in cases.items()}, budget)
        rows += table(name, timings)
    return Report("The optimizer's step", rows, NOTES)


def table(decoder: str, timings: Timings) -> Iterator[Row]:
    """A row per case and precision; each ratio is there where it means something."""
    for key in timings.seconds:
        case, precision = key.rsplit(", ", 1)
        yield {
            "decoder": decoder,
            "case": case,
            "precision": precision,
            "ms": timings.spread(key).scaled(1e3),
            "of step": timings.ratio(key, f"{STEP}, {precision}"),
            "over fp32": timings.ratio(key, f"{case}, fp32") if precision == "bf16" else None,
            "rounds": timings.rounds,
        }


def _muon(name: str, quick: bool) -> dict[tuple[str, str], Case]:
    """The step, the iteration within a step, and its matrices one by one, by (case, precision)."""
    cases: dict[tuple[str, str], Case] = {}
    for precision in ("fp32", "bf16"):
        config = recipe(name, f"optim.newton_schulz={precision}", quick=quick).optim
        model = _model_with_gradients(name, quick)
        muon = MuonAdamW(parameter_groups(model, config), config)
        cases[STEP, precision] = _stepping(muon)
        cases[ITERATION, precision] = _iterations(muon)
        cases[SINGLE, precision] = _one_by_one(iterating(muon)[1])
    return cases


def iterating(muon: MuonAdamW) -> tuple[float, list[Tensor]]:
    """Take a step: the seconds of its iterations, and the stacks (S, m, n) that they began with."""
    seconds, stacks = 0.0, []

    def timed(x: Tensor) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        y = newton_schulz(x)
        seconds += time.perf_counter() - start
        stacks.append(x)
        return y

    with mock.patch.object(optimizers, "newton_schulz", timed):
        muon.step()
    return seconds, stacks


def _iterations(muon: MuonAdamW) -> Case:
    def run(number: int) -> float:
        return iterating(muon)[0]

    return run


def _one_by_one(stacks: list[Tensor]) -> Case:
    matrices = [matrix.clone() for stack in stacks for matrix in stack.split(1)]

    def run(number: int) -> None:
        for matrix in matrices:
            newton_schulz(matrix)

    return run


def _adamw(name: str, quick: bool) -> dict[tuple[str, str], Case]:
    cases: dict[tuple[str, str], Case] = {}
    for kind in ADAMW:
        parameters = _model_with_gradients(name, quick).parameters()
        adamw = torch.optim.AdamW(
            parameters, lr=1e-3, fused=kind == "fused", foreach=kind == "foreach"
        )
        cases[f"AdamW, {kind}", "fp32"] = _stepping(adamw)
    return cases


def _stepping(optimizer: torch.optim.Optimizer) -> Case:
    def run(number: int) -> None:
        optimizer.step()

    return run


def _model_with_gradients(name: str, quick: bool) -> nn.Module:
    chosen = recipe(name, quick=quick)
    model = init_weights(GPT(chosen.model), chosen.seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model
