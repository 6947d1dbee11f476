"""Experts a few at a time while their rows are in the cache: for CPUs.

One autograd function with a backward of its own. It keeps the first products' outputs and nothing
else: rows are gathered again and activations computed again in the backward pass, and the routing
weight's gradient comes from the hidden layer, h . (dy @ down), without the expert's output.

Experts of similar load share one batched product, padded to the largest of them with rows of
weight 0. In bf16 the padding also rounds up, and chunks have 1, 2, 4, … experts: a product of a new
shape is compiled on its first use, in the time of twenty such products, so shapes must be few.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width, M rows in all, e experts of
one chunk, C rows of each.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_moe.model import kernels
from nano_moe.model.ops import Activation, compute_dtype, swiglu
from nano_moe.model.routing import Routing, carried_out

CHUNK_BYTES = {torch.bfloat16: 64 * 2**20}  # a large chunk: its products share one call's cost
CACHE_BYTES = 4 * 2**20  # of any other dtype: a chunk that stays in the cache
# Compiled products are kept by shape; 1024 places, oneDNN's own number, are too few for 64 experts.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
SPARE, SPARE_ROWS = 1.25, 64  # of padding at most: a share of the rows, and rows per expert


class Chunk(NamedTuple):
    """Experts [first, last) with `rows` rows each, from row `start` on."""

    first: int
    last: int
    rows: int
    start: int

    @property
    def all_rows(self) -> slice:
        return slice(self.start, self.start + (self.last - self.first) * self.rows)

    def split(self, x: Tensor) -> Tensor:  # (e*C, ...) -> (e, C, ...)
        return x.view(self.last - self.first, self.rows, -1)


class Layout(NamedTuple):
    """Chunks that hold every assignment, and the experts in their order."""

    chunks: list[Chunk]
    order: Tensor | None  # (E,), the expert at each place; None: each at its own

    def places(self, ids: Tensor) -> Tensor:
        """Experts' ids to places, (M,) -> (M,); E, a dropped assignment's, stays."""
        if self.order is None:
            return ids
        n_experts = len(self.order)
        places = torch.full((n_experts + 1,), n_experts)
        places.scatter_(0, self.order, torch.arange(n_experts))
        return places.index_select(0, ids)  # which, unlike places[ids], raises for -1


def fused(
    x: Tensor, routing: Routing, first: Tensor, down: Tensor, activation: Activation = swiglu
) -> Tensor:
    """x (N, D), first (E, 2F or F, D), down (E, D, F); (N, D) in the dtype of `x`."""
    dtype, (ids, counts) = compute_dtype(x), carried_out(routing)
    row_bytes = dtype.itemsize * (first.shape[1] + 2 * down.shape[2] + x.shape[1])
    layout = lay_out(counts.tolist(), CHUNK_BYTES.get(dtype, CACHE_BYTES) // row_bytes, dtype)
    ids = layout.places(ids).view_as(routing.ids)
    gated = activation is swiglu
    y = InChunks.apply(x.to(dtype), routing.weights, first, down, ids, layout, gated)
    return y.to(x.dtype)


def lay_out(counts: list[int], most: int, dtype: torch.dtype) -> Layout:
    """In bf16, where products have a price each, sorted by load if that makes fewer chunks."""
    chunks = plan(counts, most, dtype)
    if dtype != torch.bfloat16:
        return Layout(chunks, None)
    by_load = sorted(range(len(counts)), key=counts.__getitem__)
    of_sorted = plan([counts[expert] for expert in by_load], most, dtype)
    if len(of_sorted) < len(chunks):
        return Layout(of_sorted, torch.tensor(by_load))
    return Layout(chunks, None)


def plan(counts: list[int], most: int, dtype: torch.dtype) -> list[Chunk]:
    """Neighbouring experts with rows: 2^i of them per chunk, of up to `most` rows if above one."""
    rows = [_padded(count) if dtype == torch.bfloat16 else count for count in counts]
    chunks: list[Chunk] = []
    expert = start = 0
    while expert < len(rows):
        n = 2 ** ((len(rows) - expert).bit_length() - 1)
        while n > 1 and not _fit(rows[expert : expert + n], counts[expert : expert + n], most):
            n //= 2
        widest = max(rows[expert : expert + n])
        if widest:
            chunks.append(Chunk(expert, expert + n, widest, start))
        expert, start = expert + n, start + n * widest
    return chunks


def _padded(count: int) -> int:
    """The next multiple of 32 or, beyond 512, of an eighth of the power of two below it."""
    step = max(32, 2 ** (max(count - 1, 0).bit_length() - 4))
    return -(-count // step) * step


def _fit(rows: list[int], counts: list[int], most: int) -> bool:
    """Whether these experts may share a product: all have rows, and few would be padding."""
    padded = len(rows) * max(rows)
    return min(rows) > 0 and padded <= min(most, SPARE * sum(counts) + len(rows) * SPARE_ROWS)


class InChunks(torch.autograd.Function):
    """sum_k weight_k * expert_k(x)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        first: Tensor,
        down: Tensor,
        ids: Tensor,
        layout: Layout,
        gated: bool,
    ) -> Tensor:
        chunks, dtypes = layout.chunks, (first.dtype, down.dtype)
        first, down = (_placed(weight, layout.order, x.dtype) for weight in (first, down))
        dest, token, weight = _place(ids, weights, chunks, len(first))
        kept = x.new_empty(len(token) - 1, first.shape[1])  # (M, 2F or F)
        rows = x.new_empty(len(token), x.shape[1])  # (M + 1, D)
        rows[-1] = 0  # where dropped assignments point
        for chunk in chunks:
            own, experts = chunk.all_rows, slice(chunk.first, chunk.last)
            gathered = chunk.split(x.index_select(0, token[own]))
            torch.bmm(gathered, first[experts].mT, out=chunk.split(kept[own]))
            hidden = _activate(kept[own], weight[own], gated)
            torch.bmm(chunk.split(hidden), down[experts].mT, out=chunk.split(rows[own]))
        ctx.save_for_backward(x, first, down, dest, token, weight, kept)
        ctx.layout, ctx.gated, ctx.dtypes = layout, gated, dtypes
        return F.embedding_bag(dest, rows, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, first, down, dest, token, weight, kept = ctx.saved_tensors
        dy = gradients[0].contiguous()
        chunks: list[Chunk] = ctx.layout.chunks
        order: Tensor | None = ctx.layout.order
        dweight, drows = torch.zeros_like(weight), x.new_empty(len(token), x.shape[1])
        drows[-1] = 0
        dfirst, ddown = (_for_experts(chunks, weights) for weights in (first, down))
        for chunk in chunks:
            own, experts = chunk.all_rows, slice(chunk.first, chunk.last)
            given = chunk.split(dy.index_select(0, token[own]))
            dhidden = torch.bmm(given, down[experts]).flatten(0, 1)  # of the weighted output
            backward = _activate_backward(kept[own], weight[own], dhidden, ctx.gated)
            hidden, dproduct, dweight[own] = backward
            torch.bmm(given.mT, chunk.split(hidden), out=ddown[experts])
            gathered, dproduct = chunk.split(x.index_select(0, token[own])), chunk.split(dproduct)
            torch.bmm(dproduct.mT, gathered, out=dfirst[experts])
            torch.bmm(dproduct, first[experts], out=chunk.split(drows[own]))
        dx = F.embedding_bag(dest, drows, mode="sum")
        dweights = dweight.index_select(0, dest.flatten()).view_as(dest)
        back = None if order is None else order.argsort()
        dfirst = _placed(dfirst, back, ctx.dtypes[0])
        ddown = _placed(ddown, back, ctx.dtypes[1])
        return dx, dweights, dfirst, ddown, None, None, None


def _place(
    ids: Tensor, weights: Tensor, chunks: list[Chunk], n_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row of each assignment (N, K); of each row its token and weight (M + 1,)."""
    end = chunks[-1].all_rows.stop if chunks else 0
    starts = torch.full((n_experts + 1,), end)
    for chunk in chunks:
        own = torch.arange(chunk.last - chunk.first) * chunk.rows + chunk.start
        starts[chunk.first : chunk.last] = own
    dest, token = torch.empty_like(ids), ids.new_zeros(end + 1)
    weight = torch.zeros(end + 1, dtype=weights.dtype)
    kernels.launch(kernels.place, ids, weights.contiguous(), starts, dest, token, weight)
    return dest, token, weight


def _placed(weights: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(E, m, n) in `dtype`, in the order given."""
    if order is None:
        return weights.to(dtype)
    if not kernels.usable(weights):
        return weights.index_select(0, order).to(dtype)
    placed = torch.empty_like(weights, dtype=dtype)
    kernels.launch(kernels.take, weights, order, placed)
    return placed


def _for_experts(chunks: list[Chunk], weights: Tensor) -> Tensor:
    """Room for a gradient, zero for experts without rows."""
    room, end = torch.empty_like(weights), 0
    for chunk in chunks:
        room[end : chunk.first] = 0
        end = chunk.last
    room[end:] = 0
    return room


def _activate(product: Tensor, weight: Tensor, gated: bool) -> Tensor:
    """Weighted hidden layer: (n, 2F or F), (n,) -> (n, F)."""
    if gated and kernels.usable(product):
        hidden = product.new_empty(len(product), product.shape[1] // 2)
        kernels.launch(kernels.swiglu_forward, product, weight, hidden)
        return hidden
    hidden = swiglu(product) if gated else F.gelu(product)
    return hidden.mul_(weight.to(hidden.dtype).unsqueeze(-1))


def _activate_backward(
    product: Tensor, weight: Tensor, dhidden: Tensor, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted hidden layer again, and the gradients of product and weight."""
    if gated and kernels.usable(product):
        hidden, dproduct = torch.empty_like(dhidden), torch.empty_like(product)
        dweight = torch.empty_like(weight)
        kernels.launch(kernels.swiglu_backward, product, weight, dhidden, dproduct, hidden, dweight)
        return hidden, dproduct, dweight
    scale = weight.to(product.dtype).unsqueeze(-1)
    hidden, dproduct = _unweighted_backward(product, dhidden * scale, gated)
    return hidden * scale, dproduct, (dhidden * hidden).sum(-1, dtype=weight.dtype)


def _unweighted_backward(product: Tensor, dhidden: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient of what went into it."""
    if not gated:
        return F.gelu(product), torch.ops.aten.gelu_backward(dhidden, product)
    gate, up = product.chunk(2, dim=-1)
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return silu * up, torch.cat([dgate, dhidden * silu], dim=-1)
