"""Next-token cross-entropy.

Shapes: B batch, T time, N = B*T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_moe.model import kernels
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
        each = OnePass.apply(flat, wanted)
        return each.mean() if reduction == "mean" else each
    return F.cross_entropy(
        at_least_float32(flat), wanted, reduction=reduction, ignore_index=NO_TARGET
    )


class OnePass(torch.autograd.Function):
    """The loss of each token on a CPU, without probabilities or wide logits in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # (N, V), (N,) -> (N,)
        logits, targets = logits.contiguous(), targets.contiguous()
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"a target is not in [0, {logits.shape[1]})")
        loss, largest, total = (torch.empty(len(logits)) for _ in range(3))
        kernels.launch(kernels.cross_entropy_forward, logits, targets, loss, largest, total)
        ctx.save_for_backward(logits, targets, largest, total)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, dloss = ctx.saved_tensors[0], gradients[0].contiguous()
        dlogits = torch.empty_like(logits)
        kernels.launch(kernels.cross_entropy_backward, *ctx.saved_tensors, dloss, dlogits)
        return dlogits, None
