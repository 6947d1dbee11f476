"""What `bench decode` reports, and that its sizes are what their names say."""

import importlib.util

import pytest
import torch

from nano_moe import recipe_file
from nano_moe.accounting import count
from nano_moe.bench import decode as bench
from nano_moe.bench.recipes import FOLDER
from nano_moe.model.gpt import GPT


@pytest.fixture
def one_recipe(monkeypatch):
    """The verb's rows of one recipe and those by size."""
    monkeypatch.setattr(bench, "RECIPES", ("mixtral",))
    return bench.decode


def test_both_sides_say_the_same(one_recipe):
    against, by_size = split(one_recipe(quick=True).rows)
    assert [row["rows"] for row in against] == [1, 16]
    for row in against:
        assert row["same text"] is True and row["not measured"] is None
        assert row["peer"].startswith("transformers Qwen3Moe, ")
        assert row["met"] == (row["ours / peer"].median >= row["target"] == 3)
    assert [row["decoder"] for row in by_size] == list(bench.SIZES)


def test_without_transformers_its_columns_are_empty(one_recipe, monkeypatch):
    found = importlib.util.find_spec
    absent = {"transformers": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: absent.get(n, n) and found(n))
    against, _ = split(one_recipe(quick=True).rows)
    for row in against:
        assert row["ours tokens/s"].median > 0 and "pip install" in row["not measured"]
        empty = ("peer tokens/s", "ours / peer", "met", "same text")
        assert {row[key] for key in empty} == {None}


def split(rows):
    return [r for r in rows if "recipe" in r], [r for r in rows if "decoder" in r]


def test_a_continuation_is_the_likeliest_token_by_token(moe_config, build):
    model: GPT = build(moe_config()).eval()
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = prompts
    for _ in range(6):
        whole = torch.cat([whole, model(whole)[0][:, -1:].argmax(-1)], dim=1)
    assert bench.greedy(model, prompts, 6) == whole[:, 3:].tolist()


def test_the_dense_sizes_are_the_active_and_all_weights_of_the_sparse_one():
    counts = {
        name: count(recipe_file.load(FOLDER / file, changes))
        for name, (file, changes, _) in bench.SIZES.items()
    }
    sparse = counts[bench.SPARSE]
    assert sparse.weight_bytes > 1e9 and 4 * sparse.active_params > 480 * 2**20  # of a large cache
    active, total = counts["dense, active size"], counts["dense, total size"]
    assert active.total_params == pytest.approx(sparse.active_params, rel=0.001)
    assert total.total_params == pytest.approx(sparse.total_params, rel=0.001)
