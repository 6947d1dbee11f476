"""The optimizer's step alone, and how much of it Muon's iteration takes.

Shapes: S matrices of one shape (m, n).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nano_moe.bench.recipes import DECODERS, recipe
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK, Budget, Case, Timings, interleave
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.training.optimizers import MuonAdamW, orthogonalize, parameter_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP, BATCHED, SINGLE = "MuonAdamW step", "Newton-Schulz, batched", "Newton-Schulz, one by one"
ADAMW = ("fused", "foreach")

NOTES = (
    "of step: time over that of a whole MuonAdamW step in the same precision (for the batched "
    "iteration: its share of the step; AdamW works in fp32); all ratios within a round.",
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
        in_fp32, batched = f"{case}, fp32", f"{BATCHED}, {precision}"
        yield {
            "decoder": decoder,
            "case": case,
            "precision": precision,
            "ms": timings.spread(key).scaled(1e3),
            "of step": timings.ratio(key, f"{STEP}, {precision}"),
            "over batched": timings.ratio(key, batched) if case == SINGLE else None,
            "over fp32": timings.ratio(key, in_fp32) if precision == "bf16" else None,
            "rounds": timings.rounds,
        }


def _muon(name: str, quick: bool) -> dict[tuple[str, str], Case]:
    """The step and the iteration of its matrices, by (case, precision)."""
    cases: dict[tuple[str, str], Case] = {}
    for precision, dtype in DTYPES.items():
        config = recipe(name, f"optim.newton_schulz={precision}", quick=quick).optim
        model = _model_with_gradients(name, quick)
        matrices = stacks(model)
        one_by_one = [matrix for stack in matrices for matrix in stack.split(1)]
        cases[STEP, precision] = _stepping(MuonAdamW(parameter_groups(model, config), config))
        cases[BATCHED, precision] = _orthogonalizing(matrices, dtype)
        cases[SINGLE, precision] = _orthogonalizing(one_by_one, dtype)
    return cases


def _adamw(name: str, quick: bool) -> dict[tuple[str, str], Case]:
    cases: dict[tuple[str, str], Case] = {}
    for kind in ADAMW:
        parameters = _model_with_gradients(name, quick).parameters()
        adamw = torch.optim.AdamW(
            parameters, lr=1e-3, fused=kind == "fused", foreach=kind == "foreach"
        )
        cases[f"AdamW, {kind}", "fp32"] = _stepping(adamw)
    return cases


def stacks(model: nn.Module) -> list[Tensor]:
    """The gradients of all hidden matrices as Muon iterates them: (S, m, n), m <= n, by shape."""
    config = recipe("dense", quick=False).optim
    (hidden,) = (g for g in parameter_groups(model, config) if g["name"] == "hidden")
    by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for parameter, fused in zip(hidden["params"], hidden["fused"], strict=True):
        for piece in parameter.grad.chunk(2 if fused else 1, dim=-2):
            wide = piece if piece.shape[-2] <= piece.shape[-1] else piece.mT
            rows, columns = wide.shape[-2:]
            by_shape[rows, columns].append(wide.reshape(-1, rows, columns))
    return [torch.cat(pieces) for pieces in by_shape.values()]


def _stepping(optimizer: torch.optim.Optimizer) -> Case:
    def run(number: int) -> None:
        optimizer.step()

    return run


def _orthogonalizing(matrices: list[Tensor], dtype: torch.dtype) -> Case:
    def run(number: int) -> None:
        for stack in matrices:
            orthogonalize(stack, dtype)

    return run


def _model_with_gradients(name: str, quick: bool) -> nn.Module:
    chosen = recipe(name, quick=quick)
    model = init_weights(GPT(chosen.model), chosen.seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model
