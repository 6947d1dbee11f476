"""Causal multi-head latent attention (MLA) with rotary positions.

Shapes: B batch, T time, D d_model, H heads, C nope width, R rope width, V value width,
L width of the latent of keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.config import ModelConfig
from nano_moe.model.attention import rotate
from nano_moe.model.ops import RMSNorm


class LatentAttention(nn.Module):
    """Keys and values of all heads from one latent per token; one rotated key shared by all heads.

    DeepSeek-V2 (2024), eq. 37-47. Names follow the published checkpoints; RoPE is half-split here.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        mla, width = config.mla, config.d_model
        assert mla is not None
        self.n_heads, self.mla = config.n_heads, mla
        queries = self.n_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            self.q_proj = nn.Linear(width, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, mla.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(mla.q_lora_rank, config.norm_eps)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, queries, bias=False)
        self.kv_a_proj = nn.Linear(width, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=False)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, config.norm_eps)
        keys_values = self.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_b_proj = nn.Linear(mla.kv_lora_rank, keys_values, bias=False)
        self.o_proj = nn.Linear(self.n_heads * mla.v_head_dim, width, bias=False)

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # -> (B, H, T, C + R)
        if self.mla.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        widths = [self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim]
        nope, rope = self._heads(q).split(widths, dim=-1)
        return torch.cat([nope, rotate(rope, cos, sin)], dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q = self._queries(x, cos, sin)
        mla = self.mla
        widths = [mla.kv_lora_rank, mla.qk_rope_head_dim]
        latent, rope = self.kv_a_proj(x).split(widths, dim=-1)
        rope = rotate(rope.unsqueeze(1), cos, sin)  # (B, 1, T, R)
        keys_values = self._heads(self.kv_b_proj(self.kv_a_norm(latent)))  # (B, H, T, C + V)
        nope, v = keys_values.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        k = torch.cat([nope, rope.expand(*nope.shape[:-1], -1)], dim=-1)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))
