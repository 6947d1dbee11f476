"""Decoding with experts on disk, as the study measures and counts it."""

import os

import pytest
import torch

from nano_moe import runs
from nano_moe.bench.offload import draw_weights, measure
from nano_moe.checkpoints import load_model
from nano_moe.errors import UserError
from nano_moe.evaluation import spread_windows
from nano_moe.studies import offloading


@pytest.fixture
def drawn(tmp_path, moe_config, recipe_of, tiny_corpus):
    """A run of a tiny sparse decoder, 3 layers of 4 experts, with weights as drawn."""
    recipe = recipe_of(moe_config(n_layers=3), data={"tokenizer": "byte"})
    run = runs.create(recipe, stem="run", name="run", root=tmp_path)
    draw_weights(run)
    return run


def hits_by_hand(run, windows, slots):
    """Calls that an LRU of so many experts serves, by the choices of the whole decoder."""
    _, model, _ = load_model(run)
    inside, hits, calls = [], 0, 0
    for window in windows:
        with torch.no_grad():
            routings = model(window[None])[1]
        for token in range(len(window)):
            for layer, routing in enumerate(routings):
                called = [(layer, expert) for expert in sorted(routing.ids[token].tolist())]
                kept = [one for one in inside if one in called]  # all are held from the first on
                inside = [one for one in inside if one not in called] + kept
                for key in called:
                    calls, hits = calls + 1, hits + (key in inside)
                    if key in inside:
                        inside.remove(key)
                    elif len(inside) == slots:
                        inside.pop(next(i for i, one in enumerate(inside) if one not in called))
                    inside.append(key)
    return hits / calls


def test_hits_are_those_of_the_whole_decoders_choices(drawn, tiny_corpus):
    windows, _, _ = spread_windows(tiny_corpus, drawn.recipe().model.context, offloading.WINDOWS)
    found = offloading.look(drawn, tiny_corpus)
    figures, counts = found["figures"], found["details"]["counts"]
    for share, slots in ((25, 3), (50, 6)):
        assert figures[f"chance_{share}"] == slots / 12
        wanted = hits_by_hand(drawn, windows, slots)
        assert figures[f"lru_hits_{share}"] == pytest.approx(wanted, abs=1e-12)
        lru = counts[str(share)]["lru"]
        assert lru["hits"] + lru["misses"] == windows.numel() * 3 * 2 and lru["guessed"] == 0
    assert figures["lru_hits_25"] < figures["lru_hits_50"] < 1
    ahead = counts["25"]["ahead"]
    assert figures["guesses_right"] == ahead["guessed_right"] / ahead["guessed"] > 0


def test_a_cache_that_does_not_empty_fails_first_and_is_never_recorded(drawn, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(offloading, "draw_weights", lambda run: pytest.fail("began"))
        with pytest.raises(UserError, match="cannot be timed"):
            offloading.decode(drawn, "50%")
    monkeypatch.setattr(offloading, "check_can_be_emptied", lambda folder: None)
    with pytest.raises(UserError, match="cannot be timed"):  # of what was measured
        offloading.decode(drawn, "50%")
    assert not list(drawn.path.glob("*.safetensors"))


@pytest.mark.parametrize(("grown", "experts", "memory"), [(3, 1, 3), (0.5, 1, 1)])
def test_memory_is_what_the_warm_reading_held(drawn, monkeypatch, grown, experts, memory):
    row = {
        "anonymous, GB": grown,
        "experts, GB": experts,
        "tokens/s": 1,
        "hits": 1,
        "still cached": None,
    }
    monkeypatch.setattr(offloading, "measure", lambda case: row)
    assert offloading.decode(drawn, "all")["memory_gb"] == memory


@pytest.mark.parametrize(("budget", "share"), [("all", 1), ("50%", 0.5), ("25%", 0.25)])
def test_what_is_measured_is_of_the_budget_and_leaves_nothing(
    on_disk, drawn, monkeypatch, budget, share
):
    rows = []
    measured = lambda case: rows.append(measure(case)) or rows[-1]  # noqa: E731
    monkeypatch.setattr(offloading, "measure", measured)
    found = offloading.decode(drawn, budget)
    experts = 3 * 4 * 3 * 16 * 16 * 4  # layers, experts, matrices, D, F, bytes
    assert {row["experts, GB"] for row in rows} == {experts * share / 1e9}
    assert found["memory_gb"] == max(rows[0]["anonymous, GB"], experts * share / 1e9)
    assert found["half_speed_ms_per_token"] == pytest.approx(2 * found["decode_ms_per_token"])
    assert (found["hits"] == 1) == (budget == "all")
    assert (found["cold_ms_per_token"] == found["decode_ms_per_token"]) == (budget == "all")
    assert [path.name for path in drawn.path.iterdir()] == ["recipe.yaml"]
