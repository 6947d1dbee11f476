"""CPU forms of what PyTorch's operators take several passes over memory for, with their backward.

The modules that use them say, with PyTorch's operators, what they compute; these do the same by
`kernels.py`, where `kernels.usable`.

Shapes: B batch, T time, N tokens or rows, D d_model, V vocabulary, E experts, K top_k, F hidden
width, H heads, C head width; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_moe.model import kernels


class Norm(torch.autograd.Function):
    """RMSNorm on a CPU, keeping its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, len(weight))
        y = torch.empty_like(rows)
        kernels.launch(kernels.rms_norm_forward, rows, weight, eps, y)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        dy, dx = gradients[0].contiguous().view_as(rows), torch.empty_like(rows)
        parts = torch.zeros(kernels.PARTS, len(weight))
        kernels.launch(kernels.rms_norm_backward, rows, weight, ctx.eps, dy, dx, parts)
        return dx.view_as(gradients[0]), parts.sum(0).to(weight.dtype), None


class NormAndRotation(torch.autograd.Function):
    """Norm and rotation of all heads on a CPU, keeping the projection alone.

    The heads stay beside each other in memory, so that what comes out of attention lies as the
    output projection wants it and is not copied.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> Tensor:  # (B, T, H, C) -> (B, H, T, C)
        x, cos, sin = (t.contiguous() for t in (x, cos, sin))
        y = torch.empty_like(x)
        kernels.launch(
            kernels.rotary_forward, x.flatten(0, 1), weight, eps, cos, sin, y.flatten(0, 1)
        )
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        dy, dx = gradients[0].transpose(1, 2).contiguous(), torch.empty_like(x)
        parts = torch.zeros(kernels.PARTS, len(weight))
        saved = (x.flatten(0, 1), weight, ctx.eps, cos, sin)
        rows = (dy.flatten(0, 1), dx.flatten(0, 1))
        kernels.launch(kernels.rotary_backward, *saved, *rows, parts)
        return dx, parts.sum(0).to(weight.dtype), None, None, None


class GatedFFN(torch.autograd.Function):
    """The gated FFN on a CPU; of the hidden layer it keeps the first product alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        product, ones = x @ gate_up.T, torch.ones(len(x))  # (N, 2F), (N,)
        hidden = x.new_empty(len(x), product.shape[1] // 2)
        kernels.launch(kernels.swiglu_forward, product, ones, hidden)
        ctx.save_for_backward(x, gate_up, down, product, ones)
        return hidden @ down.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, gate_up, down, product, ones = ctx.saved_tensors
        dhidden = gradients[0] @ down
        hidden, dproduct = torch.empty_like(dhidden), torch.empty_like(product)
        unused = torch.empty_like(ones)
        kernels.launch(kernels.swiglu_backward, product, ones, dhidden, dproduct, hidden, unused)
        return dproduct @ gate_up, dproduct.T @ x, gradients[0].T @ hidden


class CrossEntropy(torch.autograd.Function):
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


def largest(scores: Tensor, k: int) -> Tensor:
    """Where each row's k largest are, the largest first: (N, E) -> (N, K) int64."""
    ids = torch.empty(len(scores), k, dtype=torch.int64)
    width = -(-scores.shape[1] // kernels.LANES) * kernels.LANES
    places = torch.arange(width, dtype=torch.int32)
    keys = torch.full((kernels.PARTS, width), torch.iinfo(torch.int32).min, dtype=torch.int32)
    kernels.launch(kernels.top_k, scores.contiguous(), places, keys, ids)
    return ids
