"""Causal grouped-query attention with rotary positions.

Shapes: B batch, T time, S positions held and new, D d_model, H query heads, G key/value heads,
C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.config import ModelConfig
from nano_moe.model import kernels, one_pass
from nano_moe.model.cache import LayerCache
from nano_moe.model.ops import RMSNorm, at_least_float32

WIDE_HEAD = 64  # narrower ones attend in float32 on a CPU, faster than in bfloat16


def rope_tables(context: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotation angles, each (T, C), float32.

    Half-split layout: dimension i pairs with i + C/2. Su et al. 2021, eq. 15.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(context, dtype=torch.float64), theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's pairs by their position's angle: (B, H, T, C) -> (B, H, T, C).

    In at least float32: bfloat16 would round the angles.
    """
    wide = at_least_float32(x)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.to(wide.dtype) + turned * sin.to(wide.dtype)).to(x.dtype)


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

    def _placed(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalized and turned heads of a projection: (B, T, H*C) -> (B, H, T, C)."""
        weight = norm.weight if isinstance(norm, RMSNorm) else x.new_empty(0)
        fits = cos.shape == sin.shape == (x.shape[1], self.head_size)
        if fits and kernels.usable(x, weight, cos, sin):
            eps = norm.eps if isinstance(norm, RMSNorm) else 0.0
            return one_pass.NormAndRotation.apply(
                x.unflatten(-1, (-1, self.head_size)), weight, eps, cos, sin
            )
        heads = x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return rotate(norm(heads), cos, sin).to(x.dtype)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: LayerCache | None = None
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        q = self._placed(self.q_proj(x), self.q_norm, cos, sin)
        k = self._placed(self.k_proj(x), self.k_norm, cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        if past is not None:
            k, v = past.extend("keys", k), past.extend("values", v)
        return self.o_proj(self._attend(q, k, v, past).transpose(1, 2).flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, past: LayerCache | None) -> Tensor:
        """Causal attention, (B, H, T, C) and (B, G, S, C) twice to (B, H, T, C)."""
        gqa = self.n_heads != self.kv_heads
        if q.device.type != "cpu" or self.head_size >= WIDE_HEAD:
            return attend(q, k, v, past, gqa)
        dtype = v.dtype
        q, k, v = (at_least_float32(t) for t in (q, k, v))
        with torch.autocast("cpu", enabled=False):  # which would narrow them again
            y = attend(q, k, v, past, gqa)
        return y.to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, past: LayerCache | None, gqa: bool = False) -> Tensor:
    """Softmax attention of new queries over themselves and what is held, none later.

    q (B, H, T, C), k and v (B, G, S, C); (B, H, T, C).
    """
    if past is None or past.cache.is_first:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=past.cache.mask(), enable_gqa=gqa)
