"""The sparse feed-forward layer: router, dispatch, experts, combine, plus shared experts.

Shapes: B batch, T time, N = B*T tokens, D d_model.
"""

from __future__ import annotations

from torch import Tensor, nn

from nano_moe.config import ModelConfig
from nano_moe.model.experts import Experts
from nano_moe.model.ffn import FFN
from nano_moe.model.routing import Router, Routing


class MoE(nn.Module):
    """sum_k weight_k * expert_k(x), dropless, plus the shared experts.

    Shared experts run as one FFN of n_shared_experts * d_expert, which is equal to their sum.
    Shazeer et al. 2017, eq. 1; Dai et al. 2024 (DeepSeekMoE), eq. 9.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe is not None
        width, n_shared = config.expert_width, config.moe.n_shared_experts
        self.router = Router(config)
        self.experts = Experts(config.moe.n_experts, config.d_model, width, config.moe.backend)
        self.shared = FFN(config.d_model, n_shared * width) if n_shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:  # (B, T, D) -> (B, T, D)
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = self.router(flat)
        y = self.experts(flat, routing).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, routing
