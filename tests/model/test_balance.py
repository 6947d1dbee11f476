"""Balancing terms and load statistics against numpy, and at the loads where they are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.model.balance import (
    load_balancing_loss,
    load_statistics,
    router_entropy,
    router_z_loss,
    updated_expert_bias,
)

EXPERTS = st.integers(2, 9)


def random_routing(seed: int, n_experts: int, n_tokens: int = 20, top_k: int = 2):
    """probs (N, E), and counts (E,) of the top-k of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n_tokens, n_experts, generator=generator)
    probs = logits.softmax(-1)
    ids = probs.topk(min(top_k, n_experts)).indices
    return logits, probs, torch.bincount(ids.flatten(), minlength=n_experts)


@given(EXPERTS, st.integers(1, 4))
def test_load_balancing_loss_is_one_when_uniform(n_experts, top_k):
    probs = torch.full((8, n_experts), 1 / n_experts)
    counts = torch.full((n_experts,), 8 * top_k)
    assert load_balancing_loss(counts=counts, probs=probs).item() == pytest.approx(1, abs=1e-6)


@given(EXPERTS)
def test_load_balancing_loss_is_e_when_one_expert_takes_all(n_experts):
    probs = torch.eye(n_experts)[torch.zeros(8, dtype=torch.int64)]
    counts = 8 * torch.eye(n_experts, dtype=torch.int64)[0]
    assert load_balancing_loss(counts=counts, probs=probs).item() == n_experts


@given(st.integers(0, 99), EXPERTS)
def test_load_balancing_loss_equals_its_sum(seed, n_experts):
    _, probs, counts = random_routing(seed, n_experts)
    expected = 0.0
    for i in range(n_experts):
        f = int(counts[i]) / int(counts.sum())
        p = sum(float(row[i]) for row in probs) / len(probs)
        expected += n_experts * f * p
    value = load_balancing_loss(counts=counts, probs=probs).item()
    assert value == pytest.approx(expected, rel=1e-5)
    # E f_i / N on every token: the gradient that f_i as a constant gives
    probs.requires_grad_()
    load_balancing_loss(counts=counts, probs=probs).backward()
    share = counts.double() / counts.sum() * n_experts / len(probs)
    torch.testing.assert_close(probs.grad.double(), share.expand_as(probs), rtol=1e-5, atol=1e-8)


@given(st.integers(0, 99), EXPERTS)
def test_router_z_loss_equals_its_sum(seed, n_experts):
    logits, _, _ = random_routing(seed, n_experts)
    rows = logits.double().numpy()
    expected = np.mean(np.log(np.exp(rows).sum(-1)) ** 2)
    assert router_z_loss(logits=logits).item() == pytest.approx(expected, rel=1e-5)


def test_router_z_loss_survives_huge_logits():
    assert router_z_loss(logits=torch.tensor([[500.0, 0.0]])).item() == 250_000


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9), st.floats(1e-4, 0.5))
def test_bias_steps_raise_the_starved_and_lower_the_crowded(loads, rate):
    counts = torch.tensor(loads)
    before = torch.zeros(len(loads))
    after = updated_expert_bias(bias=before, counts=counts, rate=rate)
    mean = sum(loads) / len(loads)
    steps = np.sign([mean - load for load in loads]) * rate
    np.testing.assert_allclose(after, steps - steps.mean(), atol=1e-6)
    assert after.dtype == torch.float32
    assert not before.any(), "the old bias is not written to"
    assert abs(after.mean().item()) < 1e-6
    pairs = [(a, b) for a in range(len(loads)) for b in range(len(loads))]
    assert all(after[a] > after[b] for a, b in pairs if loads[a] < mean < loads[b])


@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4))
def test_load_statistics_equal_numpy(rows):
    loads = np.array(rows, np.int64)
    loads[:, 0] += 1  # some token went somewhere
    statistics = load_statistics(torch.from_numpy(loads))
    share = loads / loads.sum(-1, keepdims=True)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    expected = {
        "max_vio": (loads.max(-1) - loads.mean(-1)) / loads.mean(-1),
        "load_entropy": -(share * logs).sum(-1) / np.log(5),
        "max_share": share.max(-1),
        "dead_experts": (loads == 0).sum(-1),
    }
    assert statistics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(statistics[name], values, rtol=1e-5, atol=1e-6)


def test_load_statistics_of_known_loads():
    even = load_statistics(torch.tensor([7, 7, 7, 7]))
    assert {name: value.item() for name, value in even.items()} == pytest.approx(
        {"max_vio": 0, "load_entropy": 1, "max_share": 0.25, "dead_experts": 0}, abs=1e-6
    )
    collapsed = load_statistics(torch.tensor([0, 28, 0, 0]))
    assert {name: value.item() for name, value in collapsed.items()} == pytest.approx(
        {"max_vio": 3, "load_entropy": 0, "max_share": 1, "dead_experts": 3}, abs=1e-6
    )


@pytest.mark.parametrize("counts", [torch.tensor([5]), torch.zeros(4, dtype=torch.int64)])
def test_load_statistics_are_finite_for_one_expert_and_for_no_tokens(counts):
    assert all(value.isfinite() for value in load_statistics(counts).values())


@given(st.integers(0, 99), EXPERTS)
def test_router_entropy_equals_its_sum(seed, n_experts):
    _, probs, _ = random_routing(seed, n_experts)
    rows = probs.double().numpy()
    expected = np.mean(-(rows * np.log(rows)).sum(-1)) / np.log(n_experts)
    assert router_entropy(probs).item() == pytest.approx(expected, rel=1e-5)
    assert router_entropy(torch.eye(n_experts)).item() == 0
