"""Who goes where, against plain Python: counts, groups, capacity queues, experts' choice, hashes.

Shapes: B sequences, T time, N = B*T tokens, E experts, K top_k.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_moe.model.routing import (
    Routing,
    best_experts,
    count_tokens,
    drop_overflow,
    dropped_share,
    experts_choose,
    hash_table,
    limit_to_groups,
)

SEEDS = st.integers(0, 999)
SCORES = ("max", "top2_sum")


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_counts_are_a_histogram(n_tokens, top_k, n_experts, seed):
    ids = np.random.default_rng(seed).integers(0, n_experts, (n_tokens, top_k))
    counts = count_tokens(torch.from_numpy(ids).flatten(), n_experts)
    assert counts.tolist() == np.bincount(ids.ravel(), minlength=n_experts).tolist()
    assert counts.dtype == torch.int64


@given(st.integers(0, 9), st.integers(1, 5), SEEDS)
def test_counts_keep_leading_dimensions(n_choices, n_experts, seed):
    ids = np.random.default_rng(seed).integers(0, n_experts, (2, 3, n_choices))
    counts = count_tokens(torch.from_numpy(ids), n_experts)
    for i, j in np.ndindex(2, 3):
        assert counts[i, j].tolist() == np.bincount(ids[i, j], minlength=n_experts).tolist()


# Groups


def best_groups_by_hand(row: list[float], n_groups: int, top_k: int, score: str) -> set[int]:
    size, best = len(row) // n_groups, {"max": 1, "top2_sum": 2}[score]
    groups = [sorted(row[g * size : (g + 1) * size], reverse=True) for g in range(n_groups)]
    return set(sorted(range(n_groups), key=lambda g: -sum(groups[g][:best]))[:top_k])


@pytest.mark.parametrize("score", SCORES)
@given(
    groups=st.integers(1, 4).flatmap(lambda g: st.tuples(st.just(g), st.integers(1, g))),
    size=st.integers(2, 4),
    shift=st.sampled_from((-3.0, 0.0)),  # biased scores may all be negative
    seed=SEEDS,
)
def test_experts_outside_of_the_best_groups_are_out(score, groups, size, shift, seed):
    n_groups, top_k = groups
    torch.manual_seed(seed)
    selection = torch.randn(9, n_groups * size) + shift
    limited = limit_to_groups(selection, n_groups, top_k, score).tolist()
    for before, after in zip(selection.tolist(), limited, strict=True):
        best = best_groups_by_hand(before, n_groups, top_k, score)
        assert after == [
            value if e // size in best else -math.inf for e, value in enumerate(before)
        ]


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("score", SCORES)
def test_all_groups_are_no_limit(n_groups, score):
    selection = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(limit_to_groups(selection, n_groups, n_groups, score), selection)


# Capacity


def routing_of(ids: Tensor, n_experts: int) -> Routing:
    """A routing of (N, K) ids; capacity looks at nothing else."""
    nothing = torch.empty(len(ids), n_experts)
    counts = count_tokens(ids.flatten(), n_experts)
    return Routing(ids, torch.rand(ids.shape), nothing, nothing, counts)


def queue_by_hand(ids: list[list[int]], n_experts: int, factor: float) -> list[list[bool]]:
    """One sequence: all first choices in order of position, then all second choices, ..."""
    length, top_k = len(ids), len(ids[0])
    room = [math.ceil(Fraction(str(factor)) * top_k * length / n_experts)] * n_experts
    kept = [[False] * top_k for _ in ids]
    for choice in range(top_k):
        for position, chosen in enumerate(ids):
            if room[chosen[choice]] > 0:
                room[chosen[choice]] -= 1
                kept[position][choice] = True
    return kept


@st.composite
def choices(draw) -> tuple[Tensor, int]:
    """(B, T, K) distinct experts per token, crowded on the first ones or not, and E."""
    n_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, n_experts))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 12)), n_experts
    crowding = draw(st.sampled_from((0.0, 1.0, 9.0)))
    torch.manual_seed(draw(SEEDS))
    scores = torch.randn(shape) - crowding * torch.arange(n_experts)
    return scores.topk(top_k, dim=-1).indices, n_experts


FACTORS = st.sampled_from((0.01, 0.5, 0.75, 1.0, 1.1, 1.25, 2.0))


@given(choices(), FACTORS)
def test_overflow_equals_a_queue(made, factor):
    ids, n_experts = made
    routing = routing_of(ids.flatten(0, 1), n_experts)
    dropped = drop_overflow(routing, len(ids), factor)
    by_hand = [queue_by_hand(sequence, n_experts, factor) for sequence in ids.tolist()]
    kept = [token for sequence in by_hand for token in sequence]
    assert dropped.kept.tolist() == kept
    assert all(now is before for now, before in zip(dropped[:-1], routing[:-1], strict=True))
    carried_out = sum(map(sum, kept))
    assert dropped_share(dropped).item() == pytest.approx(1 - carried_out / ids.numel(), abs=1e-6)


@given(choices(), FACTORS)
def test_no_expert_of_a_sequence_is_over_capacity_and_none_drops_below_it(made, factor):
    ids, n_experts = made
    n_sequences, length, top_k = ids.shape
    kept = drop_overflow(routing_of(ids.flatten(0, 1), n_experts), n_sequences, factor).kept
    capacity = math.ceil(Fraction(str(factor)) * top_k * length / n_experts)
    for chosen, carried_out in zip(ids, kept.view(ids.shape), strict=True):
        for expert in range(n_experts):
            wanted = int((chosen == expert).sum())
            assert int(carried_out[chosen == expert].sum()) == min(wanted, capacity)


@given(choices(), FACTORS)
def test_a_sequence_alone_drops_what_it_drops_in_a_batch(made, factor):
    ids, n_experts = made
    together = drop_overflow(routing_of(ids.flatten(0, 1), n_experts), len(ids), factor).kept
    alone = [drop_overflow(routing_of(one, n_experts), 1, factor).kept for one in ids]
    assert torch.equal(together, torch.cat(alone))


@given(choices(), st.sampled_from((1.0, 1.5)))
def test_room_for_every_token_drops_nothing(made, beyond):
    ids, n_experts = made
    routing = routing_of(ids.flatten(0, 1), n_experts)
    factor = beyond * n_experts / ids.shape[-1]
    dropped = drop_overflow(routing, len(ids), factor)
    assert dropped.kept.all()
    assert dropped_share(dropped) == dropped_share(routing) == 0


def test_a_capacity_is_that_of_the_factor_as_written():
    """In floats 1.1 * 100 is above 110, and its ceiling 111."""
    kept = drop_overflow(routing_of(torch.zeros(200, 1, dtype=torch.int64), 2), 1, 1.1).kept
    assert int(kept.sum()) == 110


def test_a_late_first_choice_comes_before_an_early_second_choice():
    ids = torch.tensor([[0, 1], [2, 1], [1, 0], [1, 2]])  # room for 2 of the 4 who want expert 1
    kept = drop_overflow(routing_of(ids, 4), 1, 1.0).kept
    assert kept.tolist() == [[True, False], [True, False], [True, True], [True, True]]


# Experts choose


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 5),
    SEEDS,
)
def test_each_expert_takes_its_best_tokens(sizes, n_experts, seed):
    n_tokens, capacity = sizes
    torch.manual_seed(seed)
    scores = torch.rand(n_tokens, n_experts)
    taken = experts_choose(scores, capacity)
    for expert in range(n_experts):
        column = scores[:, expert].tolist()
        best = sorted(range(n_tokens), key=lambda token: -column[token])[:capacity]
        assert set(taken[:, expert].nonzero().flatten().tolist()) == set(best)


# Hashes


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 1), (8, 2), (6, 6), (1, 1)])
def test_a_hash_names_distinct_experts_about_equally_often(n_experts, top_k):
    vocab = 4096
    table = hash_table(vocab, n_experts, top_k, layer=3)
    assert table.shape == (vocab, top_k)
    assert all(len(set(row)) == top_k for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=n_experts).double()
    share = top_k / n_experts  # of the tokens; each draws for itself
    assert (counts - vocab * share).abs().max() <= 4.5 * (vocab * share * (1 - share)) ** 0.5


def test_a_hash_depends_on_nothing_but_its_sizes_and_layer():
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        tables.append(hash_table(64, 8, 2, layer=5))
        assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from it either"
    assert torch.equal(*tables)


def test_layers_hash_independently():
    tables = [hash_table(4096, 8, 1, layer) for layer in range(4)]
    for i, table in enumerate(tables):
        for other in tables[:i]:
            agree = (table == other).double().mean().item()
            assert agree == pytest.approx(1 / 8, abs=4.5 * (7 / 64 / 4096) ** 0.5)


@given(
    seed=st.integers(0, 2**16), n_tokens=st.integers(0, 9), n_experts=st.integers(1, 9),
    levels=st.integers(1, 9),
)  # fmt: skip
def test_the_best_experts_are_the_largest_and_of_equals_the_first(
    seed, n_tokens, n_experts, levels
):
    generator = torch.Generator().manual_seed(seed)
    shape = (n_tokens, n_experts)
    scores = torch.randint(levels, shape, generator=generator).float()
    scores[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    for top_k in range(1, n_experts + 1):
        ids = best_experts(scores, top_k)
        expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(ids, expected)


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (32, 4), (33, 3), (64, 8), (200, 6)])
def test_the_best_of_many_experts_for_many_tokens(n_experts, top_k):
    """More than a kernel's vectors hold, and more tokens than it has parts."""
    torch.manual_seed(0)
    scores = torch.randn(500, n_experts).softmax(-1)
    assert len(scores.unique()) > 0.9 * scores.numel()
    assert torch.equal(best_experts(scores, top_k), scores.topk(top_k).indices)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_experts_are_distinct_where_scores_are_not_numbers(top_k):
    scores = torch.full((4, 5), torch.nan)
    scores[1, 2] = scores[2, 4] = 1
    ids = best_experts(scores, top_k)
    assert ((ids >= 0) & (ids < 5)).all()
    assert all(len(set(row)) == top_k for row in ids.tolist())
