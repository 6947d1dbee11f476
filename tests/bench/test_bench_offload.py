"""What `bench offload` reports of one budget."""

from pathlib import Path

import pytest
import torch

from nano_moe import runs
from nano_moe.bench.offload import (
    PROMPT,
    SHARES,
    Case,
    _untrained,
    draw_weights,
    drawn_text,
    measure,
    shares_of,
)

EVERYTHING = 4 * 8 * 3 * 16 * 32 * 4  # layers, experts, matrices, D, F, bytes


def test_everything_in_memory_misses_nothing_once_it_was_read(tmp_path):
    run = _untrained(Path(tmp_path), quick=True)
    threads, text = torch.get_num_threads(), drawn_text(run.recipe())
    found = measure(Case(str(run.path), text, budget="100%"))
    assert torch.get_num_threads() == threads
    assert found["experts, GB"] == pytest.approx(EVERYTHING / 1e9)
    some = measure(Case(str(run.path), text, budget="12.5%", cold=True))
    assert 0 <= some["hits"] < found["hits"] <= 1 and some["tokens/s"] > 0


def test_without_a_budget_there_is_no_file(tmp_path):
    run = _untrained(Path(tmp_path), quick=True)
    found = measure(Case(str(run.path), drawn_text(run.recipe()), budget=None))
    assert found["hits"] == 1 and found["experts, GB"] == pytest.approx(EVERYTHING / 1e9)
    assert not list(run.path.glob("*.safetensors"))


def test_shares_that_hold_no_tokens_experts_are_left_out(tmp_path, moe_config, recipe_of):
    assert shares_of(_untrained(Path(tmp_path), quick=True)) == list(SHARES)
    recipe = recipe_of(moe_config(n_layers=1))  # 2 of 4 experts, and no more
    run = runs.create(recipe, stem="run", name="small", root=tmp_path)
    draw_weights(run)
    assert shares_of(run) == [50, 75, 100]


def test_the_text_is_of_many_tokens_and_of_its_seed(tmp_path):
    recipe = _untrained(Path(tmp_path), quick=True).recipe()
    text = drawn_text(recipe)
    assert len(text) == recipe.model.context > PROMPT and len(set(text)) > len(text) // 2
    assert text == drawn_text(recipe) != drawn_text(recipe.model_copy(update={"seed": 1}))
