"""The dense feed-forward network with its gate and up products apart.

Shapes: D d_model, F hidden width; `...` any leading dimensions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.model.cache import LayerCache
from nano_moe.model.ffn import FFN


class SeparateFFN(nn.Module):
    """The function of a gated `FFN` in three products: what it costs is compared, not assumed."""

    def __init__(self, ffn: FFN):
        super().__init__()
        gate, up = ffn.gate_up.weight.detach().chunk(2)  # each (F, D)
        self.gate = nn.Linear(gate.shape[1], gate.shape[0], bias=False)
        self.up = nn.Linear(gate.shape[1], gate.shape[0], bias=False)
        self.gate.weight.data.copy_(gate)
        self.up.weight.data.copy_(up)
        self.down = ffn.down

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, past: LayerCache | None = None
    ) -> tuple[Tensor, None]:
        """(..., D) to (..., D), as `FFN.forward`."""
        return self.down(F.silu(self.gate(x)) * self.up(x)), None
