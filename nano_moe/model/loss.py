"""Next-token cross-entropy.

Shapes: B batch, T time, N = B*T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_moe.model import kernels, one_pass
from nano_moe.model.ops import at_least_float32

NO_TARGET = -(2**63)  # PyTorch's own is -100, which here would hide a fault


def cross_entropy(
    logits: Tensor, targets: Tensor, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Next-token cross-entropy in nats, in at least float32.

    logits (B, T, V), targets (B, T) int64; scalar, or (B*T,) for "none". No target is ignored: on
    CPUs one that is not in [0, V) raises IndexError.
    """
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    fits = len(wanted) == len(flat) and wanted.dtype == torch.int64
    if fits and kernels.usable(flat):
        each = one_pass.CrossEntropy.apply(flat, wanted)
        return each.mean() if reduction == "mean" else each
    return F.cross_entropy(
        at_least_float32(flat), wanted, reduction=reduction, ignore_index=NO_TARGET
    )
