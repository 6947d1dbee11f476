"""Attention against a float64 loop over positions, and what rotary positions promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rotation import randomized, turned

from nano_moe.model.attention import Attention, rope_tables, rotate

SHAPES = {
    "heads": {"n_kv_heads": None},
    "grouped": {"n_kv_heads": 2},
    "one kv head": {"n_kv_heads": 1},
    "wide heads": {"n_kv_heads": 2, "head_dim": 6},
    "qk_norm": {"n_kv_heads": 2, "qk_norm": True},
}


def attention_of(dense_config, seed: int = 0, **fields) -> tuple[Attention, tuple]:
    """A float64 attention with random weights (norms too), and its rotary tables."""
    torch.manual_seed(seed)
    config = dense_config(**fields)
    return randomized(Attention(config), config)


def by_hand(attention: Attention, x: np.ndarray, theta: float, eps: float) -> np.ndarray:
    """(T, D) to (T, D): softmax over the past, one head and one position after the other."""
    size, n_heads, n_groups = attention.head_size, attention.n_heads, attention.kv_heads
    weight = {n: p.detach().numpy() for n, p in attention.named_parameters()}

    def heads(name, n):
        rows = (x @ weight[f"{name}_proj.weight"].T).reshape(len(x), n, size)
        if f"{name}_norm.weight" in weight:
            rms = np.sqrt((rows**2).mean(-1, keepdims=True) + eps)
            rows = rows / rms * weight[f"{name}_norm.weight"]
        return rows

    q, k, v = heads("q", n_heads), heads("k", n_groups), heads("v", n_groups)
    out = np.zeros((len(x), n_heads, size))
    for head in range(n_heads):
        group = head * n_groups // n_heads
        for t in range(len(x)):
            query = turned(q[t, head], t, theta)
            keys = [turned(k[s, group], s, theta) for s in range(t + 1)]
            scores = np.array([query @ key for key in keys]) / np.sqrt(size)
            shares = np.exp(scores) / np.exp(scores).sum()
            out[t, head] = sum(share * v[s, group] for s, share in enumerate(shares))
    return out.reshape(len(x), -1) @ weight["o_proj.weight"].T


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_attention_equals_a_loop_over_positions(dense_config, fields):
    config = dense_config(**fields)
    attention, tables = attention_of(dense_config, **fields)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        y = attention(x, *tables)
    for row, expected in zip(y, x.numpy(), strict=True):
        hand = by_hand(attention, expected, config.rope_theta, config.norm_eps)
        np.testing.assert_allclose(row, hand, atol=2e-6)  # the tables are float32


def test_turned_scores_depend_on_the_distance_only():
    cos, sin = (table.double() for table in rope_tables(64, 8, 10_000.0))
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everywhere = lambda one: rotate(one.expand(1, 1, 64, 8), cos, sin)[0, 0]  # noqa: E731
    scores = everywhere(q) @ everywhere(k).T  # (64, 64)
    for distance in (-40, -3, 0, 1, 7, 63):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-6)
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-4, "distance does matter"
    torch.testing.assert_close(everywhere(q).norm(dim=-1), q.norm().expand(64))  # turns keep length


def test_attention_gives_the_same_at_any_starting_position(dense_config):
    attention, _ = attention_of(dense_config)
    cos, sin = (table.double() for table in rope_tables(100, 4, 10_000.0))
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        start = attention(x, cos[:12], sin[:12])
        later = attention(x, cos[88:], sin[88:])
        unturned = attention(x, torch.ones_like(cos[:12]), torch.zeros_like(sin[:12]))
    torch.testing.assert_close(later, start, rtol=0, atol=1e-5)
    assert (unturned - start).abs().max() > 1e-2


def test_qk_norm_forgets_the_size_of_queries_and_keys(dense_config):
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    for qk_norm in (True, False):
        attention, tables = attention_of(dense_config, qk_norm=qk_norm)
        with torch.no_grad():
            before = attention(x, *tables)
            attention.q_proj.weight.mul_(50)
            attention.k_proj.weight.mul_(0.5)
            change = (attention(x, *tables) - before).abs().max()
        assert change < 1e-4 if qk_norm else change > 1e-1


def test_under_autocast_normed_heads_meet_values_in_one_dtype(dense_config):
    attention, (cos, sin) = attention_of(dense_config, qk_norm=True)
    attention, x = attention.float(), torch.randn(2, 12, 16)
    with torch.no_grad():
        exact = attention(x, cos.float(), sin.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = attention(x, cos.float(), sin.float())
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(("head_dim", "expected"), [(62, torch.float32), (64, torch.bfloat16)])
def test_narrow_heads_attend_in_float32_under_autocast_too(
    dense_config, monkeypatch, head_dim, expected
):
    """What comes out of attention shows in what dtype it worked: autocast rounds what goes in."""
    attention, (cos, sin) = attention_of(dense_config, head_dim=head_dim)
    attend, found = F.scaled_dot_product_attention, []

    def watched(*tensors, **options):
        y = attend(*tensors, **options)
        found.append(y.dtype)
        return y

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention.float()(torch.randn(2, 12, 16), cos.float(), sin.float())
    assert found == [expected] and y.dtype == torch.bfloat16


def test_angles_are_not_rounded_to_the_dtype_of_what_they_turn():
    """bf16 knows a cosine to 1 in 256; turned in float32, only the result is rounded."""
    cos, sin = rope_tables(64, 8, 10_000.0)
    x = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rotate(x.double(), cos.double(), sin.double())
    assert torch.equal(rotate(x, cos, sin), exact.bfloat16())
