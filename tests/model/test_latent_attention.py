"""Latent attention against a float64 loop over positions, and that no position sees the next."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rotation import randomized, turned

from nano_moe.config import MLAConfig
from nano_moe.model.attention import rope_tables
from nano_moe.model.latent_attention import LatentAttention

WIDTHS = {"kv_lora_rank": 10, "qk_nope_head_dim": 5, "qk_rope_head_dim": 8, "v_head_dim": 7}
SHAPES = {
    "compressed queries": {"q_lora_rank": 9},
    "whole queries": {},
    "one rotated pair": {"q_lora_rank": 9, "qk_rope_head_dim": 2},
    "narrow values": {"v_head_dim": 3},
}


def latent_config(dense_config, **widths):
    return dense_config(n_heads=3, n_kv_heads=None, mla=MLAConfig(**WIDTHS | widths))


def attention_of(config) -> tuple[LatentAttention, tuple]:
    """A float64 attention with random weights (norms too), and its rotary tables."""
    torch.manual_seed(0)
    return randomized(LatentAttention(config), config)


def by_hand(attention: LatentAttention, x: np.ndarray, config) -> np.ndarray:
    """(T, D) to (T, D): each head's keys and values unfolded, one position after the other."""
    mla, theta, eps = config.mla, config.rope_theta, config.norm_eps
    nope, latent = mla.qk_nope_head_dim, mla.kv_lora_rank
    weight = {name: p.detach().numpy() for name, p in attention.named_parameters()}

    def normed(name, vector):
        return vector / np.sqrt((vector**2).mean() + eps) * weight[f"{name}.weight"]

    def query(t, head):
        if mla.q_lora_rank is None:
            whole = weight["q_proj.weight"] @ x[t]
        else:
            whole = weight["q_b_proj.weight"] @ normed("q_a_norm", weight["q_a_proj.weight"] @ x[t])
        own = whole.reshape(config.n_heads, -1)[head]
        return np.concatenate([own[:nope], turned(own[nope:], t, theta)])

    def key_and_value(t, head):
        down = weight["kv_a_proj.weight"] @ x[t]
        whole = weight["kv_b_proj.weight"] @ normed("kv_a_norm", down[:latent])
        own = whole.reshape(config.n_heads, -1)[head]
        return np.concatenate([own[:nope], turned(down[latent:], t, theta)]), own[nope:]

    out = np.zeros((len(x), config.n_heads, mla.v_head_dim))
    for head in range(config.n_heads):
        for t in range(len(x)):
            asked = query(t, head)
            keys, values = zip(*(key_and_value(s, head) for s in range(t + 1)), strict=True)
            scores = np.array(keys) @ asked / np.sqrt(len(asked))
            shares = np.exp(scores) / np.exp(scores).sum()
            out[t, head] = shares @ np.array(values)
    return out.reshape(len(x), -1) @ weight["o_proj.weight"].T


@pytest.mark.parametrize("widths", SHAPES.values(), ids=SHAPES)
def test_latent_attention_equals_a_loop_over_positions(dense_config, widths):
    config = latent_config(dense_config, **widths)
    attention, tables = attention_of(config)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        y = attention(x, *tables)
    for row, vectors in zip(y, x.numpy(), strict=True):
        hand = by_hand(attention, vectors, config)
        np.testing.assert_allclose(row, hand, atol=2e-6)  # the tables are float32


@pytest.mark.parametrize("widths", SHAPES.values(), ids=SHAPES)
def test_no_position_sees_the_next(dense_config, widths):
    attention, tables = attention_of(latent_config(dense_config, **widths))
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    y = attention(x, *tables)
    for t in range(12):
        (seen,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        reaches = seen[0].abs().amax(-1)
        assert not reaches[t + 1 :].any(), f"position {t} sees a later one"
        assert (reaches[: t + 1] > 0).all(), f"position {t} misses an earlier one"


def test_latent_attention_gives_the_same_at_any_starting_position(dense_config):
    attention, _ = attention_of(latent_config(dense_config))
    cos, sin = (table.double() for table in rope_tables(100, 8, 10_000.0))
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        start = attention(x, cos[:12], sin[:12])
        later = attention(x, cos[88:], sin[88:])
        unturned = attention(x, torch.ones_like(cos[:12]), torch.zeros_like(sin[:12]))
    torch.testing.assert_close(later, start, rtol=0, atol=1e-5)
    assert (unturned - start).abs().max() > 1e-2


def test_under_autocast_turned_queries_and_keys_meet_values_in_one_dtype(dense_config):
    attention, (cos, sin) = attention_of(latent_config(dense_config))
    attention, x = attention.float(), torch.randn(2, 12, 16)
    with torch.no_grad():
        exact = attention(x, cos.float(), sin.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = attention(x, cos.float(), sin.float())
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() / exact.norm() < 2e-2
