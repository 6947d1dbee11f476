"""What is said when loss or gradients stop being finite: step, layers, last good checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch

from nano_moe.errors import UserError
from nano_moe.runs import Run, write_json
from nano_moe.training.module import Decoder


def report_nonfinite(error: UserError, run: Run, module: Decoder) -> UserError:
    """Write per-parameter statistics to nonfinite.json; the one-line fault that names them."""
    rows = [_statistics(name, p) for name, p in module.model.named_parameters()]
    bad = [row["parameter"] for row in rows if row["gradient_max"] is None]
    path = run.path / "nonfinite.json"
    write_json(path, {"fault": str(error), "parameters": rows})
    where = f" (first in {bad[0]})" if bad else ""
    return UserError(
        f"{error}{where}; layer statistics are in {path}, the last good checkpoint is "
        f"{run.last}; train anew with a lower optim.lr"
    )


def _statistics(name: str, parameter: torch.nn.Parameter) -> dict[str, Any]:
    return {
        "parameter": name,
        "weight_max": _largest(parameter.detach()),
        "gradient_max": None if parameter.grad is None else _largest(parameter.grad),
    }


def _largest(x: torch.Tensor) -> float | None:
    """Largest magnitude; None when it is not finite (JSON has no NaN)."""
    largest = x.abs().amax().item()
    return largest if math.isfinite(largest) else None
