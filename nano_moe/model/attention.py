"""Causal grouped-query attention with rotary positions.

Shapes: B batch, T time, D d_model, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.config import ModelConfig
from nano_moe.model.ops import RMSNorm


def rope_tables(context: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotation angles, each (T, C), float32.

    Half-split layout: dimension i pairs with i + C/2. Su et al. 2021, eq. 15.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(context, dtype=torch.float64), theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's pairs by their position's angle: (B, H, T, C) -> (B, H, T, C)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Ainslie et al. 2023 (GQA); per-head query and key norms before RoPE where `qk_norm`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.kv_heads = config.n_heads, config.kv_heads
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.d_model, self.n_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.d_model, self.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, self.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_size, config.d_model, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_size, config.norm_eps)
            self.k_norm = RMSNorm(self.head_size, config.norm_eps)

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        return x.unflatten(-1, (n_heads, self.head_size)).transpose(1, 2)  # (B, H, T, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q = rotate(self.q_norm(self._heads(self.q_proj(x), self.n_heads)), cos, sin)
        k = rotate(self.k_norm(self._heads(self.k_proj(x), self.kv_heads)), cos, sin)
        v = self._heads(self.v_proj(x), self.kv_heads)
        q, k = q.to(v.dtype), k.to(v.dtype)
        gqa = self.n_heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).flatten(-2))
