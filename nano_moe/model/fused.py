"""Experts one after the other while their rows are in the cache: for CPUs.

One autograd function with a backward of its own. It keeps the first products' outputs and nothing
else: rows are gathered again and activations computed again in the backward pass, and the routing
weight's gradient comes from the hidden layer, h . (dy @ down), without the expert's output.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_moe.model.ops import Activation, compute_dtype, swiglu
from nano_moe.model.routing import Routing, carried_out


def fused(
    x: Tensor, routing: Routing, first: Tensor, down: Tensor, activation: Activation = swiglu
) -> Tensor:
    """x (N, D), first (E, 2F or F, D), down (E, D, F); (N, D) in the dtype of `x`."""
    dtype, (ids, counts) = compute_dtype(x), carried_out(routing)
    order = ids.argsort(stable=True)  # (N*K,), dropped ones last
    operands = (x.to(dtype), routing.weights, first.to(dtype), down.to(dtype))
    return ExpertByExpert.apply(*operands, order, counts.tolist(), activation is swiglu).to(x.dtype)


class ExpertByExpert(torch.autograd.Function):
    """sum_k weight_k * expert_k(x), summed in at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        first: Tensor,
        down: Tensor,
        order: Tensor,
        counts: list[int],
        gated: bool,
    ) -> Tensor:
        token, weight = order // weights.shape[1], weights.flatten()[order].to(x.dtype)
        y = torch.zeros(x.shape, dtype=weights.dtype)
        kept = x.new_empty(sum(counts), first.shape[1])
        for expert, rows in _slices(counts):
            product = kept[rows]
            torch.mm(x[token[rows]], first[expert].T, out=product)
            hidden = _activate(product, gated).mul_(weight[rows].unsqueeze(-1))
            y.index_add_(0, token[rows], (hidden @ down[expert].T).to(y.dtype))
        ctx.save_for_backward(x, weights, first, down, order, kept)
        ctx.counts, ctx.gated = counts, gated
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, first, down, order, kept = ctx.saved_tensors
        dy = gradients[0].to(x.dtype)
        token, weight = order // weights.shape[1], weights.flatten()[order].to(x.dtype)
        dx = torch.zeros(x.shape, dtype=weights.dtype)
        dweight = weights.new_zeros(weights.numel())
        dfirst, ddown = torch.zeros_like(first), torch.zeros_like(down)
        for expert, rows in _slices(ctx.counts):
            given = dy[token[rows]]  # (n, D)
            dhidden = given @ down[expert]  # (n, F), of the unweighted output
            hidden, dproduct = _activate_backward(kept[rows], dhidden, ctx.gated)
            scale = weight[rows].unsqueeze(-1)
            dweight[rows] = (dhidden * hidden).sum(-1).to(dweight.dtype)
            torch.mm(given.T, hidden.mul_(scale), out=ddown[expert])
            dproduct.mul_(scale)
            torch.mm(dproduct.T, x[token[rows]], out=dfirst[expert])
            dx.index_add_(0, token[rows], (dproduct @ first[expert]).to(dx.dtype))
        dweights = torch.empty_like(dweight).scatter_(0, order, dweight).view_as(weights)
        return dx.to(x.dtype), dweights, dfirst, ddown, None, None, None


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that got rows, and which."""
    start = 0
    for expert, n in enumerate(counts):
        if n:
            yield expert, slice(start, start + n)
        start += n


def _activate(product: Tensor, gated: bool) -> Tensor:  # (n, 2F or F) -> (n, F)
    if not gated:
        return F.gelu(product)
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _activate_backward(product: Tensor, dhidden: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient of what went into it."""
    if not gated:
        return F.gelu(product), torch.ops.aten.gelu_backward(dhidden, product)
    gate, up = product.chunk(2, dim=-1)
    silu, dproduct = F.silu(gate), torch.empty_like(product)
    dgate, dup = dproduct.chunk(2, dim=-1)
    torch.mul(dhidden, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(dhidden * up, gate, grad_input=dgate)
    return silu.mul_(up), dproduct
