"""The dense feed-forward network.

Shapes: M rows, D d_model, F hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nano_moe.model import kernels
from nano_moe.model.ops import compute_dtype, swiglu


class FFN(nn.Module):
    """down(silu(gate x) * (up x)) with gate and up fused, gate rows first; or down(gelu(up x)).

    Shazeer 2020, eq. 6; Hendrycks & Gimpel 2016.
    """

    def __init__(self, d_model: int, hidden: int, activation: str = "swiglu"):
        super().__init__()
        self.gated = activation == "swiglu"
        if self.gated:
            self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)  # weight (2F, D)
        else:
            self.up = nn.Linear(d_model, hidden, bias=False)  # weight (F, D)
        self.down = nn.Linear(hidden, d_model, bias=False)  # weight (D, F)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, None]:
        """(..., D) to (..., D); tokens are taken for the sparse layer's sake and not looked at."""
        dtype = compute_dtype(x)
        one_pass = self.gated and dtype in kernels.DTYPES
        if one_pass and kernels.usable(x, self.gate_up.weight, self.down.weight):
            operands = (x.reshape(-1, x.shape[-1]), self.gate_up.weight, self.down.weight)
            return OnePass.apply(*(t.to(dtype) for t in operands)).view(x.shape), None
        hidden = swiglu(self.gate_up(x)) if self.gated else F.gelu(self.up(x))
        return self.down(hidden), None


class OnePass(torch.autograd.Function):
    """The gated FFN on a CPU; of the hidden layer it keeps the first product alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        product, ones = x @ gate_up.T, torch.ones(len(x))  # (M, 2F), (M,)
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
