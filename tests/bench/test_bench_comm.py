"""What `bench comm` measures and computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nano_moe.bench import comm
from nano_moe.bench.group import on_ranks
from nano_moe.communication import LINKS, groups_met, ranks_needed, seconds_at_least, sent
from nano_moe.config import MoEConfig
from nano_moe.errors import UserError
from nano_moe.model import expert_parallel
from nano_moe.model.expert_parallel import pack
from nano_moe.model.router import Router
from nano_moe.model.routing import Routing, count_tokens


def chosen(order, groups, limit, top_k):
    """Experts in the order of their scores; those of the groups met first, by hand."""
    size = len(order) // groups
    allowed = list(dict.fromkeys(expert // size for expert in order))[:limit]
    return [expert for expert in order if expert // size in allowed][:top_k]


@pytest.mark.parametrize(("groups", "limit", "top_k"), [(3, 2, 2), (3, 2, 3), (2, 1, 3), (6, 6, 3)])
def test_groups_met_are_those_of_every_order_of_scores(groups, limit, top_k):
    orders = list(itertools.permutations(range(6)))
    found = [len({e // (6 // groups) for e in chosen(o, groups, limit, top_k)}) for o in orders]
    expected = {met: found.count(met) / len(orders) for met in set(found)}
    computed = {met: chance for met, chance in groups_met(6, top_k, groups, limit) if chance}
    assert computed == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("limited", [{}, {"n_groups": 6, "top_k_groups": 2}])
def test_ranks_needed_are_those_of_every_order_of_scores(ranks, limited):
    moe = MoEConfig(n_experts=6, top_k=2, **limited)
    groups, limit = limited.get("n_groups", 6), limited.get("top_k_groups", 6)
    needs = [
        len({expert // (6 // ranks) for expert in chosen(order, groups, limit, 2)})
        for order in itertools.permutations(range(6))
    ]
    assert ranks_needed(moe, ranks) == pytest.approx(sum(needs) / len(needs))


@pytest.mark.parametrize("limited", [{}, {"n_groups": 8, "top_k_groups": 3}])
def test_a_router_of_random_scores_needs_as_many_ranks(moe_config, limited):
    """The decoder's own choice and packing, over many tokens."""
    moe = {"n_experts": 16, "top_k": 6, "d_expert": 8, **limited}
    router = Router(moe_config(moe))
    scores = torch.rand(20_000, 16, generator=torch.Generator().manual_seed(0))
    ids = router.select(scores)
    counts = count_tokens(ids.flatten(), 16)
    load = pack(Routing(ids, torch.ones(ids.shape), scores, scores, counts), 4)
    assert len(load.token) / 20_000 == pytest.approx(ranks_needed(MoEConfig(**moe), 4), rel=0.01)


def test_known_figures(moe_config):
    """Mixtral's 2 of 8 on 8 ranks: 7/8 of two copies; one expert a rank is never met twice."""
    model = moe_config({"n_experts": 8})
    found = sent(model, 8, "bf16", tokens=70)
    assert found.copies == found.copies_per_expert == pytest.approx(2 * 7 / 8)
    there, back = 16 * 2 + 2 * 4 + 2 * 4, 16 * 4
    assert found.forward_bytes == pytest.approx(1.75 * (there + back) + 7 * 8 / 70)
    assert found.backward_bytes == pytest.approx(1.75 * (there - 8 + back))
    assert sent(model, 1, "fp32", tokens=70).bytes == 0
    hashed = sent(moe_config({"n_experts": 8, "routing": "hash"}), 8, "bf16", tokens=70)
    assert hashed.backward_bytes == pytest.approx(1.75 * (there - 16 + back))
    infiniband = next(link for link in LINKS if "400" in link.name)
    assert seconds_at_least(50e9, infiniband) == 1


@pytest.mark.parametrize(
    ("moe", "told"),
    [
        ({"n_experts": 6}, "n_experts=6"),
        ({"routing": "expert_choice"}, "expert_choice"),
        ({"n_groups": 2}, "n_groups=2"),
        ({"n_experts": 8, "n_groups": 4, "group_score": "top2_sum"}, "group_score"),
    ],
)
def test_what_has_no_formula_is_refused(moe, told):
    with pytest.raises(UserError, match=told):
        ranks_needed(MoEConfig(**{"n_experts": 4, "top_k": 2, **moe}), 4)


def test_a_limit_bounds_the_copies_that_published_models_send():
    rows = [row for row in comm.bounds() if row["model"] == "deepseek-v2"]
    copies = {row["groups"]: row["copies"] for row in rows}
    assert copies["1 of 8"] == pytest.approx(7 / 8)
    assert copies["1 of 8"] < copies["3 of 8"] < 3 * 7 / 8 < copies["8 of 8"]
    own = [row for row in rows if row["groups"] == "3 of 8"]
    waits = [row["at least, µs/token"] * row["GB/s, stated"] for row in own]
    assert len(own) == len(LINKS) and waits == pytest.approx([waits[0]] * len(LINKS))


@pytest.fixture(scope="module")
def steps():
    """Of every tiny case of four ranks: (recipe, its steps by rank)."""
    cases = [changes for ranks, changes in comm.CASES if ranks == 4]
    recipes = [comm._recipe(changes, quick=True) for changes in cases]
    return list(zip(recipes, comm.measure(recipes, 4, 2), strict=True))


def test_a_measured_row_is_near_the_formula(steps):
    for recipe, of in steps:
        row = comm._row(recipe, of)
        assert row["steps"] == 2 and row["ranks"] == 4
        assert 0.6 < row["over formula"] < 1.6
        assert 0 < row["least"] <= row["exchange share"] < 1


METERED = (
    ("model.n_layers=2",),
    (*comm.FINE, "model.moe.n_groups=4", "model.moe.top_k_groups=2", "trainer.precision=bf16"),
)


def metered(changes: list[str]) -> dict[str, Any]:
    """In one of several processes: three steps, and every exchange that it took part in."""
    exchanges: list[tuple[int, list[int]]] = []  # bytes of a row, rows from each rank
    exchange = expert_parallel.all_to_all_single

    def noted(rows, receive, send, group):
        exchanges.append((rows.shape[1:].numel() * rows.itemsize, receive))
        return exchange(rows, receive, send, group)

    expert_parallel.all_to_all_single = noted
    parallel, marks, steps = comm.ParallelStep(comm._recipe(changes, quick=True)), [0], []
    forward = parallel.module.training_step

    def training_step(*arguments):
        done = forward(*arguments)
        marks.append(len(exchanges))
        return done

    parallel.module.training_step = training_step
    for number in range(3):
        steps.append(parallel.run(number))
        marks.append(len(exchanges))
    expert_parallel.all_to_all_single = exchange
    return {"steps": steps, "exchanges": exchanges, "marks": marks}


def every_metered() -> list[dict[str, Any]]:
    return [metered(changes) for changes in METERED]


def test_the_meter_counts_what_the_other_ranks_received():
    """Each step's passes by themselves, by the receivers' books; a row is per token and layer."""
    for changes, of in zip(METERED, zip(*on_ranks(4, every_metered), strict=True), strict=True):
        recipe, steps = comm._recipe(changes, quick=True), []
        for rank, own in enumerate(of):
            steps.append([comm.Step(*step) for step in own["steps"]])
            others = [other["exchanges"] for other in of if other is not own]
            passes = list(itertools.pairwise(own["marks"]))
            received = [
                sum(width * rows[rank] for other in others for width, rows in other[first:last])
                for first, last in passes
            ]
            told = [(step.forward_bytes, step.backward_bytes) for step in steps[rank]]
            assert list(itertools.chain(*told)) == received and min(received) > 0
            assert all(0 < step.exchange_seconds < step.seconds for step in steps[rank])
        row, layers = comm._row(recipe, steps), recipe.model.n_layers
        total = sum(step.forward_bytes + step.backward_bytes for of in steps for step in of)
        tokens = 4 * 3 * recipe.trainer.batch_size * recipe.model.context
        per_token = row["forward bytes"] + row["backward bytes"]
        assert per_token == pytest.approx(total / tokens / layers, rel=1e-12)
