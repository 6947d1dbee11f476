"""The sparse feed-forward layer: router, dispatch, experts, combine, plus shared experts.

Shapes: B batch, T time, N = B*T tokens, D d_model.
"""

from __future__ import annotations

from torch import Tensor, nn

from nano_moe.config import ModelConfig
from nano_moe.model.experts import Experts
from nano_moe.model.ffn import FFN
from nano_moe.model.router import make_router
from nano_moe.model.routing import Routing, drop_overflow


class MoE(nn.Module):
    """sum_k weight_k * expert_k(x), plus the shared experts.

    Shared experts run as one FFN of n_shared_experts * d_expert, which is equal to their sum;
    `shared_gate` weighs them by sigmoid(w x) (Qwen2-MoE). Nothing is dropped, except in training
    under a capacity factor. Shazeer et al. 2017, eq. 1; Dai et al. 2024 (DeepSeekMoE), eq. 9.
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        assert config.moe is not None
        moe, width, act = config.moe, config.expert_width, config.activation
        self.capacity_factor = moe.capacity_factor
        self.router = make_router(config, layer)
        self.experts = Experts(moe.n_experts, config.d_model, width, moe.backend, act)
        n_shared = moe.n_shared_experts
        self.shared = FFN(config.d_model, n_shared * width, act) if n_shared else None
        gated = moe.shared_expert_gate
        self.shared_gate = nn.Linear(config.d_model, 1, bias=False) if gated else None

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, T, D) and the tokens' ids (B, T), which hash routing needs; (B, T, D)."""
        routing = self.router(x, tokens)
        if self.training and self.capacity_factor is not None:
            routing = drop_overflow(routing, x.shape[0], self.capacity_factor)
        y = self.experts(x.reshape(-1, x.shape[-1]), routing).view_as(x)
        if self.shared is not None:
            shared = self.shared(x)[0]
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return y, routing
