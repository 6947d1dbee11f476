"""What experts on several ranks exchange, as the study measures and counts it."""

import pytest
import torch

from nano_moe import runs
from nano_moe.bench import comm
from nano_moe.bench.offload import draw_weights
from nano_moe.checkpoints import load_model
from nano_moe.evaluation import spread_windows
from nano_moe.studies import exchanging
from nano_moe.studies.schema import EXCHANGED


def test_copies_are_the_ranks_of_a_tokens_experts_less_its_own(
    tmp_path, moe_config, recipe_of, tiny_corpus
):
    moe = {"n_experts": 8, "n_groups": 4, "top_k_groups": 2}
    recipe = recipe_of(moe_config(moe, n_layers=2), data={"tokenizer": "byte"})
    run = runs.create(recipe, stem="run", name="run", root=tmp_path)
    draw_weights(run)
    figures = exchanging.look(run, tiny_corpus)["figures"]
    _, model, _ = load_model(run)
    windows, _, _ = spread_windows(tiny_corpus, recipe.model.context, exchanging.WINDOWS)
    with torch.no_grad():
        chosen = [ids for routing in model(windows)[1] for ids in routing.ids.tolist()]
    others = [len({e // 2 for e in ids} - {home}) for ids in chosen for home in range(4)]
    assert figures["copies"] == pytest.approx(sum(others) / len(others))
    assert figures["chance_copies"] == pytest.approx(0.75 * (2 - 1 / 7))  # two of one pair: 1 in 7


def test_time_in_the_exchange_is_that_of_the_rank_that_waited_least(
    monkeypatch, moe_config, recipe_of
):
    recipe = recipe_of(moe_config({"n_experts": 8}))
    slow, fast = comm.Step(0.5, 0.1, 0, 600, 300), comm.Step(0.5, 0.4, 0, 0, 300)
    monkeypatch.setattr(exchanging, "measure", lambda recipes, ranks, steps: [[[slow], [fast]]])
    found = exchanging.exchange(recipe, 2)
    assert tuple(found) == EXCHANGED
    assert (found["exchange_ms"], found["rest_ms"], found["step_ms"]) == pytest.approx(
        (100, 400, 500)
    )
    tokens = 2 * recipe.tokens_per_step * 2  # of two ranks in two layers
    assert found["exchange_bytes"] == pytest.approx(1200 / tokens)
