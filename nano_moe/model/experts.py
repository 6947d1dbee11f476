"""Stacked experts and the ways tokens reach them; every way gives the same result.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.model.fused import fused
from nano_moe.model.ops import ACTIVATIONS, Activation, compute_dtype, swiglu
from nano_moe.model.routing import Routing, carried_out

ALIGNMENT = 8  # grouped products want rows of whole 16 bytes: 8 numbers of bf16


class Experts(nn.Module):
    """E feed-forward networks as two 3-D weights, in the layout of the Hugging Face classes."""

    def __init__(
        self, n_experts: int, d_model: int, hidden: int, backend: str, activation: str = "swiglu"
    ):
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[activation], activation == "swiglu"
        if self.gated:
            self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, d_model))  # (E, 2F, D)
        else:
            self.up = nn.Parameter(torch.empty(n_experts, hidden, d_model))  # (E, F, D)
        self.down = nn.Parameter(torch.empty(n_experts, d_model, hidden))  # (E, D, F)
        self.backend = backend

    def forward(self, x: Tensor, routing: Routing) -> Tensor:  # (N, D) -> (N, D)
        first = self.gate_up if self.gated else self.up
        dispatch = DISPATCH[self._choose(x) if self.backend == "auto" else self.backend]
        return dispatch(x, routing, first, self.down, self.activation)

    def _choose(self, x: Tensor) -> str:
        """Fused on a CPU; elsewhere, and under the compiler, grouped products where they can."""
        dtype, compiling = compute_dtype(x), torch.compiler.is_compiling()
        if x.device.type == "cpu" and not compiling and type(x) is Tensor:
            return "fused"
        exists = dtype != torch.float64 and not (compiling and dtype == torch.float32)
        return "grouped" if exists else "loop"


def loop(
    x: Tensor, routing: Routing, first: Tensor, down: Tensor, activation: Activation = swiglu
) -> Tensor:
    """The reference: one expert after the other, each on the tokens that chose it.

    x (N, D), first (E, 2F or F, D), down (E, D, F); (N, D) in the dtype of `x`.
    """
    ids, y = carried_out(routing)[0].view_as(routing.ids), torch.zeros_like(x)
    for expert in range(first.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        hidden = activation(F.linear(x[token], first[expert]))
        out = F.linear(hidden, down[expert])
        weight = routing.weights[token, slot].unsqueeze(-1)
        y = y.index_add(0, token, (out * weight).to(y.dtype))
    return y


def grouped(
    x: Tensor, routing: Routing, first: Tensor, down: Tensor, activation: Activation = swiglu
) -> Tensor:
    """Assignments sorted by expert, then one grouped product per weight; no host sync.

    x (N, D), first (E, 2F or F, D), down (E, D, F); (N, D) in the dtype of `x`. The combine
    gathers and sums over K, so the forward adds in a fixed order on every device. Dropped
    assignments sort behind the last group, where grouped products leave their rows unwritten:
    masked on the way in and out, neither they nor their gradients reach a token.
    """
    n_tokens, top_k = routing.ids.shape
    width, dtype = x.shape[-1], compute_dtype(x)
    x = F.pad(x, (0, -width % ALIGNMENT))
    first, down = _aligned(first, down)
    ids, counts = carried_out(routing)
    order = ids.argsort(stable=True)  # (N*K,)
    ends = counts.cumsum(0).to(torch.int32)  # (E,)
    rows = x.index_select(0, order // top_k).to(dtype)  # (N*K, D), grouped by expert
    places = torch.arange(len(order), device=x.device)
    beyond = None if routing.kept is None else (places >= ends[-1]).unsqueeze(-1)  # (N*K, 1)
    rows = rows if beyond is None else rows.masked_fill(beyond, 0)
    hidden = activation(F.grouped_mm(rows, first.to(dtype).mT, offs=ends))  # (N*K, F)
    out = F.grouped_mm(hidden, down.to(dtype).mT, offs=ends)  # (N*K, D)
    out = out if beyond is None else out.masked_fill(beyond, 0)
    back = torch.empty_like(order).scatter_(0, order, places)
    per_token = out.index_select(0, back).view(n_tokens, top_k, x.shape[-1])  # (N, K, D)
    return (per_token * routing.weights.unsqueeze(-1)).sum(1)[:, :width].to(x.dtype)


def _aligned(first: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The weights with zeros up to whole multiples of ALIGNMENT: (E, 2F or F, D), (E, D, F)."""
    width, hidden = (-size % ALIGNMENT for size in down.shape[1:])
    if not width and not hidden:
        return first, down
    halves = first.unflatten(1, (-1, down.shape[2]))  # (E, 2 or 1, F, D)
    return F.pad(halves, (0, width, 0, hidden)).flatten(1, 2), F.pad(down, (0, hidden, 0, width))


DISPATCH = {"loop": loop, "grouped": grouped, "fused": fused}
