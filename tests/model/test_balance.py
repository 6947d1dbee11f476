"""Balancing terms and load statistics against brute force, and where their values are known.

Shapes: N tokens, K top_k, E experts, A values of an attribute.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.model.balance import (
    load_balancing_loss,
    load_statistics,
    mutual_information,
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


@given(st.integers(1, 3), st.integers(1, 4), EXPERTS, st.integers(0, 99))
def test_load_balancing_loss_of_sequences_is_the_mean_of_theirs(layers, sequences, n_experts, seed):
    """Per sequence E/(K T) * sum_i c_i * mean_t p_ti; DeepSeek-V3, eq. 17-20, less its alpha."""
    torch.manual_seed(seed)
    length, top_k = 5, min(2, n_experts)
    probs = torch.randn(layers, sequences, length, n_experts).softmax(-1).requires_grad_()
    ids = probs.topk(top_k).indices
    counts = torch.nn.functional.one_hot(ids, n_experts).sum((-3, -2))
    expected = 0.0
    for layer, sequence, expert in np.ndindex(layers, sequences, n_experts):
        chosen = sum(row.count(expert) for row in ids[layer, sequence].tolist())
        f = n_experts / (top_k * length) * chosen
        p = sum(row[expert] for row in probs[layer, sequence].tolist()) / length
        expected += f * p / (layers * sequences)
    loss = load_balancing_loss(counts=counts, probs=probs)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, probs)
    shares = n_experts * counts / (top_k * length) / (length * layers * sequences)
    torch.testing.assert_close(gradient, shares.unsqueeze(-2).expand_as(probs))


def test_sequences_that_balance_each_other_are_unbalanced_one_by_one():
    probs = torch.eye(2).repeat_interleave(6, 0)  # one sequence per expert
    apart, together = probs.view(2, 6, 2), probs
    counts = torch.tensor([[6, 0], [0, 6]])
    assert load_balancing_loss(counts=counts, probs=apart).item() == 2
    assert load_balancing_loss(counts=counts.sum(0), probs=together).item() == 1


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


LOADS = st.lists(st.integers(0, 50), min_size=2, max_size=9)


@given(LOADS.filter(any), st.floats(1e-4, 0.5), st.integers(0, 99))
def test_error_steps_are_in_proportion_to_the_relative_error(loads, rate, seed):
    before = torch.randn(len(loads), generator=torch.Generator().manual_seed(seed))
    after = updated_expert_bias(bias=before, counts=torch.tensor(loads), rate=rate, rule="error")
    mean = sum(loads) / len(loads)
    moved = [
        b + rate * (mean - load) / mean for b, load in zip(before.tolist(), loads, strict=True)
    ]
    centre = sum(moved) / len(moved)
    np.testing.assert_allclose(after, [b - centre for b in moved], atol=2e-6)
    more = updated_expert_bias(
        bias=before, counts=1000 * torch.tensor(loads), rate=rate, rule="error"
    )
    torch.testing.assert_close(more, after, rtol=0, atol=2e-6)


@given(LOADS.filter(any))
def test_the_sign_rule_forgets_how_far_off_a_load_is(loads):
    counts, bias = torch.tensor(loads), torch.zeros(len(loads))
    signs = updated_expert_bias(bias=bias, counts=counts, rate=0.1)
    steps = (signs - signs[0]) / 0.1
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["sign", "error"])
@pytest.mark.parametrize("load", [0, 7])
def test_an_even_load_moves_no_bias(rule, load):
    bias = torch.tensor([0.5, -0.5, 0.0])
    after = updated_expert_bias(bias=bias, counts=torch.full((3,), load), rate=0.1, rule=rule)
    assert torch.equal(after, bias)


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


# Mutual information


def information_by_hand(joint: list[list[int]]) -> float:
    """Sum of p log2 p / (p_a p_e) over the pairs that were met."""
    total = sum(map(sum, joint))
    rows, columns = (
        [sum(row) for row in joint],
        [sum(column) for column in zip(*joint, strict=True)],
    )
    return sum(
        n / total * math.log2(n * total / (rows[a] * columns[e]))
        for a, row in enumerate(joint)
        for e, n in enumerate(row)
        if n
    )


def entropy_by_hand(counts: list[int]) -> float:
    shares = [n / sum(counts) for n in counts if n]
    return -sum(p * math.log2(p) for p in shares)


TABLES = (
    st.tuples(st.integers(1, 5), st.integers(1, 5))
    .flatmap(
        lambda size: st.lists(
            st.lists(st.integers(0, 30), min_size=size[1], max_size=size[1]),
            min_size=size[0],
            max_size=size[0],
        )
    )
    .filter(lambda table: any(map(any, table)))
)


@given(TABLES)
def test_mutual_information_equals_its_sum_within_its_bounds(table):
    value = mutual_information(torch.tensor(table)).item()
    assert value == pytest.approx(information_by_hand(table), abs=1e-9)
    by_attribute, by_expert = map(sum, table), map(sum, zip(*table, strict=True))
    least = min(entropy_by_hand(list(by_attribute)), entropy_by_hand(list(by_expert)))
    assert -1e-9 <= value <= least + 1e-9
    swapped = mutual_information(torch.tensor(table).T).item()
    assert swapped == pytest.approx(value, abs=1e-9), "experts tell as much of the attribute"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), LOADS.filter(any))
def test_independent_choices_carry_no_information(attribute, load):
    joint = torch.tensor([[a * e for e in load] for a in attribute])
    assert abs(mutual_information(joint).item()) < 1e-9


@given(LOADS.filter(any), st.integers(0, 99))
def test_an_attribute_that_decides_carries_the_loads_entropy(load, seed):
    experts = np.random.default_rng(seed).permutation(len(load))
    joint = torch.zeros(len(load), len(load), dtype=torch.int64)
    for attribute, expert in enumerate(experts):
        joint[attribute, expert] = load[attribute]
    expected = entropy_by_hand(load)
    assert mutual_information(joint).item() == pytest.approx(expected, abs=1e-9)


def test_mutual_information_of_many_layers_is_that_of_each():
    torch.manual_seed(0)
    joint = torch.randint(0, 9, (2, 3, 4, 5))
    values = mutual_information(joint)
    assert values.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        assert values[i, j].item() == pytest.approx(information_by_hand(joint[i, j].tolist()))
    assert mutual_information(torch.zeros(4, 5)).item() == 0, "no tokens, no information"
    assert mutual_information(torch.tensor([[2**40, 0], [0, 2**40]])).item() == 1
