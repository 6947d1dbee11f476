"""Stacked experts and the ways tokens reach them; every way gives the same result.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.model.ops import compute_dtype, swiglu
from nano_moe.model.routing import Routing


class Experts(nn.Module):
    """E SwiGLU networks as two 3-D weights, in the fused layout of the Hugging Face classes."""

    def __init__(self, n_experts: int, d_model: int, hidden: int, backend: str):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, d_model))  # (E, 2F, D)
        self.down = nn.Parameter(torch.empty(n_experts, d_model, hidden))  # (E, D, F)
        self.backend = backend

    def forward(self, x: Tensor, routing: Routing) -> Tensor:  # (N, D) -> (N, D)
        dispatch = grouped if self._use_grouped(x) else loop
        return dispatch(x, routing, self.gate_up, self.down)

    def _use_grouped(self, x: Tensor) -> bool:
        """`auto`: grouped products, except where they cannot run: unaligned rows or float64."""
        if self.backend != "auto":
            return self.backend == "grouped"
        dtype = compute_dtype(x)
        rows = (self.gate_up.shape[-1], self.down.shape[-1])
        aligned = all(width * dtype.itemsize % 16 == 0 for width in rows)
        compiled_fp32 = torch.compiler.is_compiling() and dtype == torch.float32
        return aligned and dtype != torch.float64 and not compiled_fp32


def loop(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """The reference: one expert after the other, each on the tokens that chose it.

    x (N, D), gate_up (E, 2F, D), down (E, D, F); (N, D) in the dtype of `x`.
    """
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = (routing.ids == expert).nonzero(as_tuple=True)
        hidden = swiglu(F.linear(x[token], gate_up[expert]))
        out = F.linear(hidden, down[expert])
        weight = routing.weights[token, slot].unsqueeze(-1)
        y = y.index_add(0, token, (out * weight).to(y.dtype))
    return y


def grouped(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Assignments sorted by expert, then one grouped product per weight; no host sync.

    x (N, D), gate_up (E, 2F, D), down (E, D, F); (N, D) in the dtype of `x`. The combine gathers
    and sums over K, so the forward adds in a fixed order on every device.
    """
    n_tokens, top_k = routing.ids.shape
    dtype = compute_dtype(x)
    order = routing.ids.reshape(-1).argsort(stable=True)  # (N*K,)
    ends = routing.counts.cumsum(0).to(torch.int32)  # (E,)
    rows = x.index_select(0, order // top_k).to(dtype)  # (N*K, D), grouped by expert
    hidden = swiglu(F.grouped_mm(rows, gate_up.to(dtype).mT, offs=ends))  # (N*K, F)
    out = F.grouped_mm(hidden, down.to(dtype).mT, offs=ends)  # (N*K, D)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    per_token = out.index_select(0, back).view(n_tokens, top_k, x.shape[-1])  # (N, K, D)
    return (per_token * routing.weights.unsqueeze(-1)).sum(1).to(x.dtype)
