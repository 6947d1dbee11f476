"""Next-token cross-entropy.

Shapes: B batch, T time, N = B*T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_moe.model import kernels
from nano_moe.model.ops import at_least_float32


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy in nats, in at least float32.

    logits (B, T, V), targets (B, T); scalar, or (B*T,) for "none".
    """
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    if kernels.usable(flat):
        each = OnePass.apply(flat, wanted)
        return each.mean() if reduction == "mean" else each
    return F.cross_entropy(at_least_float32(flat), wanted, reduction=reduction)


class OnePass(torch.autograd.Function):
    """The loss of each token on a CPU, without probabilities or wide logits in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # (N, V), (N,) -> (N,)
        logits, targets = logits.contiguous(), targets.contiguous()
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"a target is not in [0, {logits.shape[1]})")
        loss, log_total = torch.empty(len(logits)), torch.empty(len(logits))
        kernels.launch(kernels.cross_entropy_forward, logits, targets, loss, log_total)
        ctx.save_for_backward(logits, targets, log_total)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_total = ctx.saved_tensors
        dlogits, dloss = torch.empty_like(logits), gradients[0].contiguous()
        kernels.launch(kernels.cross_entropy_backward, logits, targets, log_total, dloss, dlogits)
        return dlogits, None
