"""Routing statistics of an evaluation, against counting by hand.

Shapes: B sequences, T time, E experts, K top_k.
"""

import math
from collections import Counter

import pytest
import torch

from nano_moe.errors import UserError
from nano_moe.evaluation import RoutingTally, count_pairs, evaluate
from nano_moe.text.windows import EvalWindows


def information(pairs: Counter) -> float:
    """Mutual information of (attribute, expert) pairs in bits, term by term."""
    total = sum(pairs.values())
    left, right = Counter(), Counter()
    for (a, e), n in pairs.items():
        left[a] += n
        right[e] += n
    return sum(
        n / total * math.log2(n * total / (left[a] * right[e])) for (a, e), n in pairs.items()
    )


def test_rows_equal_counting_every_choice_of_the_validation_split(moe_config, build, tiny_corpus):
    model = build(moe_config(moe={"n_experts": 4, "top_k": 2, "first_k_dense": 1}, n_layers=3))
    rows = evaluate(model, tiny_corpus, batch_size=2, precision="fp32").routing
    assert [row["layer"] for row in rows] == [1, 2]
    windows = EvalWindows(tiny_corpus.val, model.config.context, tiny_corpus.tokenizer.end_id)
    by_domain = {1: Counter(), 2: Counter()}
    by_token = {1: Counter(), 2: Counter()}
    with torch.no_grad():
        for i in range(len(windows)):
            inputs, _, domains = windows[i]
            routings = model(torch.from_numpy(inputs)[None])[1]
            for layer in (1, 2):
                for t, chosen in enumerate(routings[layer].ids.tolist()):
                    by_domain[layer].update((int(domains[t]), e) for e in chosen)
                    by_token[layer].update((int(inputs[t]), e) for e in chosen)
    for row in rows:
        pairs = by_domain[row["layer"]]
        load = [sum(n for (_, e), n in pairs.items() if e == expert) for expert in range(4)]
        assert row["load"] == pytest.approx([n / sum(load) for n in load])
        assert row["max_vio"] == pytest.approx(max(load) / (sum(load) / 4) - 1, rel=1e-5)
        assert row["domain_information"] == pytest.approx(information(pairs), abs=1e-9)
        tokens = information(by_token[row["layer"]])
        assert row["token_information"] == pytest.approx(tokens, abs=1e-9)
        assert 0 < row["domain_information"] < row["token_information"]


def test_a_hash_of_the_token_tells_all_that_there_is_to_know(moe_config, build, tiny_corpus):
    model = build(moe_config(moe={"routing": "hash", "top_k": 1, "n_experts": 4}))
    for row in evaluate(model, tiny_corpus, batch_size=4, precision="fp32").routing:
        assert row["token_information"] == pytest.approx(2 * row["load_entropy"], rel=1e-5)
        assert row["router_entropy"] == pytest.approx(0, abs=1e-6)


def test_a_tally_does_not_depend_on_how_it_was_batched(moe_config, build, tokens):
    model = build(moe_config())
    domains = torch.arange(24) % 3
    whole, parts = RoutingTally(3, 264), RoutingTally(3, 264)
    with torch.no_grad():
        whole.add(model(tokens)[1], tokens, domains)
        for i in range(2):
            parts.add(model(tokens[i : i + 1])[1], tokens[i : i + 1], domains[12 * i : 12 * i + 12])
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one.keys() == other.keys()
        assert one.pop("domain_load") == other.pop("domain_load")
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-5), name


def test_loads_by_domain_are_of_the_tokens_of_each(moe_config, build, tokens):
    tally, domains = RoutingTally(3, 264), torch.arange(24) // 12  # none of the third
    with torch.no_grad():
        routings = build(moe_config())(tokens)[1]
        tally.add(routings, tokens, domains)
    for row, routing in zip(tally.rows(), routings, strict=True):
        for domain in range(2):
            chosen = routing.ids[12 * domain : 12 * domain + 12].flatten().bincount(minlength=4)
            assert row["domain_load"][domain] == pytest.approx((chosen / 24).tolist())
        assert row["domain_load"][2] == [0, 0, 0, 0]


def test_pairs_are_counted_per_value(moe_config, build, tokens):
    routing = build(moe_config())(tokens)[1][0]
    values = torch.arange(24) % 5
    pairs = Counter()
    for value, chosen in zip(values.tolist(), routing.ids.tolist(), strict=True):
        pairs.update((value, e) for e in chosen)
    found = torch.zeros(6, 4, dtype=torch.int64)
    for times in (1, 2):
        count_pairs(found, values, routing.ids)
        assert all(found[a, e] == times * pairs[a, e] for a in range(6) for e in range(4))


def test_a_model_that_sees_the_future_is_refused(moe_config, build, tiny_corpus):
    model = build(moe_config(moe={"routing": "expert_choice"}))
    with pytest.raises(UserError, match=r"model\.moe\.routing: expert_choice sees the future"):
        evaluate(model, tiny_corpus, batch_size=4, precision="fp32")
