"""What is said when loss or gradients stop being finite: step, layers, last good checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch

from nano_moe import ranks
from nano_moe.errors import SaidElsewhere, UserError
from nano_moe.runs import Run, write_json
from nano_moe.training.layouts import local
from nano_moe.training.module import Decoder


def report_nonfinite(error: UserError, run: Run, module: Decoder) -> UserError:
    """Write per-parameter statistics to nonfinite.json; the one-line fault that names them.

    Collective, and one process writes.
    """
    rows = _of_all([_statistics(name, p) for name, p in module.model.named_parameters()])
    if not ranks.leads():
        return SaidElsewhere(str(error))
    bad = [row["parameter"] for row in rows if row["gradient_max"] is None]
    path = run.path / "nonfinite.json"
    write_json(path, {"fault": str(error), "parameters": rows})
    where = f" (first in {bad[0]})" if bad else ""
    return UserError(
        f"{error}{where}; layer statistics are in {path}, the last good checkpoint is "
        f"{run.last}; train anew with a lower optim.lr"
    )


def _of_all(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the processes that hold parts of a parameter found, in one row."""
    merged = []
    for own in zip(*ranks.gathered(rows), strict=True):
        figures = {name: [row[name] for row in own] for name in ("weight_max", "gradient_max")}
        worst = {name: None if None in found else max(found) for name, found in figures.items()}
        merged.append(own[0] | worst)
    return merged


def _statistics(name: str, parameter: torch.nn.Parameter) -> dict[str, Any]:
    return {
        "parameter": name,
        "weight_max": _largest(parameter.detach()),
        "gradient_max": None if parameter.grad is None else _largest(parameter.grad),
    }


def _largest(x: torch.Tensor) -> float | None:
    """Largest magnitude; None when it is not finite (JSON has no NaN)."""
    own = local(x)
    largest = own.abs().amax().item() if own.numel() else 0.0
    return largest if math.isfinite(largest) else None
