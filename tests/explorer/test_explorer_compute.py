"""Sizes on the page, against the accounting of recipes that are what the page speaks of."""

from pathlib import Path

import pytest

from nano_moe import recipe_file
from nano_moe.accounting import attention_flops, count
from nano_moe.census import census
from nano_moe.explorer.compute import bands, compute, published

ROOT = Path(__file__).parent.parent.parent
MLA = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
SHAPES = {
    "top-2": {},
    "shared and gated": {"moe": {"n_shared_experts": 2, "shared_expert_gate": True, "d_expert": 4}},
    "some layers dense": {"moe": {"first_k_dense": 1}, "n_layers": 3},
    "every second": {"moe": {"every_n_layers": 2}, "n_layers": 4},
    "untied": {"tie_embeddings": False},
    "latent attention": {"mla": MLA, "n_kv_heads": None},
    "one layer": {"n_layers": 1},
    "noise and scale": {"moe": {"noisy_top_k": True, "per_expert_scale": True}},
    "hash": {"moe": {"routing": "hash"}},
    "gelu": {"activation": "gelu", "qk_norm": True},
}


def weight_flops(recipe):
    return count(recipe).forward_flops_per_token - attention_flops(recipe.model)


def sizes(model):
    return model["total"], model["active"], model["flops"]


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_every_top_k_is_what_the_accounting_says_of_that_recipe(moe_config, recipe_of, fields):
    moe = {"d_expert": 8, **fields.get("moe", {})}
    config = moe_config(**{**fields, "moe": moe})
    own = compute("a run", config)["run"]
    for k in range(1, 5):
        recipe = recipe_of(moe_config(**{**fields, "moe": {**moe, "top_k": k}}))
        more, expected = k - own["top_k"], count(recipe)
        assert own["total"] + more * own["more"]["total"] == expected.total_params
        assert own["active"] + more * own["more"]["active"] == expected.active_params
        assert own["flops"] + more * own["more"]["flops"] == weight_flops(recipe)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_the_bands_are_all_of_the_weights(moe_config, recipe_of, fields):
    config = moe_config(**fields)
    found = list(bands(config))
    assert sum(part["params"] for band in found for part in band["parts"]) == (
        count(recipe_of(config)).total_params
    )
    sparse = [band["layer"] for band in found if any(part["experts"] for part in band["parts"])]
    assert sparse == [layer for layer in range(config.n_layers) if config.is_sparse(layer)]
    assert all(part["params"] % (part["experts"] or 1) == 0 for b in found for part in b["parts"])


def test_dense_twins_are_the_dense_recipes_of_those_widths(moe_config, dense_config, recipe_of):
    config = moe_config(moe={"n_experts": 4, "top_k": 2, "n_shared_experts": 1, "d_expert": 8})
    document = compute("a run", config)
    equal_active, equal_total = document["twins"]
    for k in (1, 2, 4):
        twin = recipe_of(dense_config(d_ff=(k + 1) * 8))
        moved = [
            equal_active[name] + (k - 2) * equal_active["more"][name]
            for name in ("total", "active", "flops")
        ]
        assert moved == [count(twin).total_params, count(twin).active_params, weight_flops(twin)]
    whole = recipe_of(dense_config(d_ff=5 * 8))
    assert sizes(equal_total) == (
        count(whole).total_params,
        count(whole).total_params,
        weight_flops(whole),
    )
    assert document["attention_flops"] == attention_flops(config)


def test_a_dense_run_is_its_own_twin(dense_config, recipe_of):
    document = compute("a run", dense_config())
    assert document["twins"] == []
    assert document["run"]["total"] == document["run"]["active"]
    assert document["run"]["more"] == {"total": 0, "active": 0, "flops": 0}
    parts = [part for band in bands(dense_config()) for part in band["parts"]]
    assert sum(part["params"] for part in parts) == count(recipe_of(dense_config())).total_params


def test_published_models_are_those_that_count_counts():
    found = {model["name"]: model for model in published(ROOT / "recipes" / "published")}
    files = sorted((ROOT / "recipes" / "published").glob("*.yaml"))
    assert len(found) == len(files) > 5
    for path in files:
        loaded = recipe_file.load_any(path)
        counted, model = census(loaded), found[loaded.published.name]
        assert (model["total"], model["active"]) == (counted.total_params, counted.active_params)
        assert model["rumour"] == loaded.published.rumour
        if counted.sparsity is not None:
            assert model["flops"] == counted.sparsity.flops_per_token
            assert model["top_k"] > 0
    assert found["GPT-4"]["rumour"]
    assert list(published(ROOT / "nowhere")) == []
