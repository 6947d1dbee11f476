"""Small shared pieces: precision floors, RMSNorm, activations.

Shapes: D d_model, F hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.model import kernels, one_pass


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged where it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products on `x` run in: autocast's where it is on, else that of `x`.

    For products that autocast does not know, such as `grouped_mm`.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a fused product: (..., 2F) -> (..., F). Shazeer 2020, eq. 5."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"swiglu": swiglu, "gelu": F.gelu}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32. Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        fits = x.shape[-1:] == self.weight.shape and x.dtype == self.weight.dtype
        if fits and kernels.usable(x, self.weight):
            return one_pass.Norm.apply(x, self.weight, self.eps)
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
