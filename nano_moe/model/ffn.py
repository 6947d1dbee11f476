"""The dense feed-forward network.

Shapes: D d_model, F hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

from torch import Tensor, nn

from nano_moe.model.ops import ACTIVATIONS


class FFN(nn.Module):
    """down(silu(gate x) * (up x)) with gate and up fused, gate rows first; or down(gelu(up x)).

    Shazeer 2020, eq. 6; Hendrycks & Gimpel 2016.
    """

    def __init__(self, d_model: int, hidden: int, activation: str = "swiglu"):
        super().__init__()
        self.activation, self.first = ACTIVATIONS[activation]
        width = 2 * hidden if self.first == "gate_up" else hidden
        self.add_module(self.first, nn.Linear(d_model, width, bias=False))  # (2F or F, D)
        self.down = nn.Linear(hidden, d_model, bias=False)  # weight (D, F)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, None]:
        """(..., D) to (..., D); tokens are taken for the sparse layer's sake and not looked at."""
        return self.down(self.activation(self.get_submodule(self.first)(x))), None
