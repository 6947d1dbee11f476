"""The dense feed-forward network.

Shapes: D d_model, F hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

from torch import Tensor, nn

from nano_moe.model.ops import swiglu


class FFN(nn.Module):
    """SwiGLU with gate and up fused, gate rows first: down(silu(gate x) * (up x)).

    Shazeer 2020, eq. 6.
    """

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)  # weight (2F, D)
        self.down = nn.Linear(hidden, d_model, bias=False)  # weight (D, F)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # (..., D) -> (..., D)
        return self.down(swiglu(self.gate_up(x))), None
