"""The dense feed-forward network.

Shapes: D d_model, F hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.model import kernels, one_pass
from nano_moe.model.cache import LayerCache
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

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, past: LayerCache | None = None
    ) -> tuple[Tensor, None]:
        """(..., D) to (..., D); what the sparse layer needs besides is taken and not looked at."""
        dtype = compute_dtype(x)
        known = self.gated and dtype in kernels.DTYPES
        if known and kernels.usable(x, self.gate_up.weight, self.down.weight):
            operands = (x.reshape(-1, x.shape[-1]), self.gate_up.weight, self.down.weight)
            return one_pass.GatedFFN.apply(*(t.to(dtype) for t in operands)).view(x.shape), None
        hidden = swiglu(self.gate_up(x)) if self.gated else F.gelu(self.up(x))
        return self.down(hidden), None
