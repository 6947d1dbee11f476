"""Every YAML under recipes/ is of one kind, builds, and steps; the ladder compares fairly."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from nano_moe import recipe_file
from nano_moe.accounting import count
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT
from nano_moe.published import Published
from nano_moe.training.module import Decoder

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
LADDER = ("dense", "switch", "mixtral", "deepseek", "deepseek-v3")


def kinds(path: Path) -> list[str]:
    """Which of the kinds of recipe a file is: a run, a published model, or a study of runs."""
    values = set(recipe_file.read_tree(path).values)
    fields = {
        "trainable": {"model", "optim", "trainer"},
        "published": {"published", "model"},
        "count-only": {"published", "weights"},
        "study": {"study"},
    }
    return [kind for kind, needed in fields.items() if needed <= values]


def of_kind(*wanted: str) -> pytest.MarkDecorator:
    """Parametrise over the files of these kinds, wherever they lie."""
    chosen = [path for path in FILES if set(kinds(path)) & set(wanted)]
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in chosen]
    return pytest.mark.parametrize("path", chosen, ids=names)


def load(path: Path, *overrides: str) -> Recipe:
    """A recipe that leaves its text to the user is given a name of one."""
    own_text = not recipe_file.read_tree(path).values.get("data", {}).get("domains", True)
    files = ["data.files=text.txt"] if own_text else []
    return recipe_file.load(path, [*files, *overrides])


def test_there_are_recipes():
    assert {"base", "char", *LADDER} <= {path.stem for path in FILES}
    assert {kind for path in FILES for kind in kinds(path)} == {
        "trainable", "published", "count-only", "study",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recipe_is_of_exactly_one_kind(path):
    assert len(kinds(path)) == 1


@of_kind("published", "count-only")
def test_a_published_model_counts_and_does_not_train(path):
    assert isinstance(recipe_file.load_any(path), Published)
    with pytest.raises(UserError, match="for counting only"):
        recipe_file.load(path)


@of_kind("trainable")
def test_accounting_equals_the_built_model(path):
    recipe = load(path)
    with torch.device("meta"):
        built = GPT(recipe.model)
    assert count(recipe).total_params == sum(p.numel() for p in built.parameters())


@of_kind("trainable")
def test_a_shrunken_recipe_learns_its_batch(path):
    full = load(path)
    active = full.model.moe.n_active if full.model.moe else 1
    small = ["model.d_model=32", "model.n_heads=2", "model.context=16", "model.vocab_size=64"]
    width = [f"model.d_ff={16 * active}", "model.n_layers=2"]
    if full.model.moe and full.model.moe.init_from:  # there is no such run here to start from
        width.append("model.moe.init_from=null")
    module = Decoder(load(path, *small, *width, "trainer.steps=60", "optim.warmup_steps=0"))
    optimizer = module.configure_optimizers()[0][0]
    batch = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        output = module.training_step(batch, 0)
        output["loss"].backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output["ce"].item())
    assert losses[-1] < losses[0] - 0.1
    if full.model.moe and full.model.moe.bias_update_rate:
        assert all(router.expert_bias.abs().sum() > 0 for router in module.model.routers)


def test_the_dense_run_that_upcycling_starts_from_has_its_shape():
    sparse = load(RECIPES / "schemes" / "upcycled.yaml")
    command = "make train RECIPE=recipes/dense.yaml model.d_ff=384 NAME=dense-384"
    assert command in (RECIPES / "schemes" / "upcycled.yaml").read_text()
    dense = load(RECIPES / "dense.yaml", "model.d_ff=384")
    assert sparse.model.moe.init_from == "dense-384"
    assert dense.model.model_dump(exclude={"moe"}) == sparse.model.model_dump(exclude={"moe"})
    assert dense.data == sparse.data
    assert dense.seed != sparse.seed


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recipe_opens_with_its_question_and_its_command(path):
    lines = path.read_text().splitlines()
    comment = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert "?" in comment
    (kind,) = kinds(path)
    command = {"trainable": "make train", "study": f"make reproduce STUDY={path.stem}"}
    assert command.get(kind, "make count") in comment
    if kind in ("published", "count-only"):
        assert f"RECIPE={path.relative_to(RECIPES.parent)}\n" in comment + "\n"


def test_the_ladder_has_equal_active_parameters_tokens_and_attention():
    recipes = {name: load(RECIPES / f"{name}.yaml") for name in LADDER}
    active = {name: count(recipe).active_params for name, recipe in recipes.items()}
    assert max(active.values()) / min(active.values()) < 1.005, active
    budgets = {
        (r.tokens_per_step, r.trainer.steps, r.model.context, r.model.d_model, r.data, r.seed)
        for r in recipes.values()
    }
    assert len(budgets) == 1


def test_a_pair_differs_only_by_its_moe_block_the_absorbing_width_and_tuned_rates():
    dense, sparse = (load(RECIPES / f"{n}.yaml").model_dump() for n in ("dense", "mixtral"))
    for recipe in (dense, sparse):
        for section, field in (("model", "moe"), ("model", "d_ff"), ("optim", "lr")):
            recipe[section].pop(field)
    assert dense == sparse


def test_every_field_a_recipe_sets_carries_its_reason():
    """A listed weight's reason is its `source`, a study's is its claim: the schema demands both."""
    named = {"base", "name", "source", "note", "rumour"}
    for path in (path for path in FILES if kinds(path) != ["study"]):
        for line in path.read_text().partition("\nweights:")[0].splitlines():
            key, _, rest = line.partition(":")
            is_setting = rest.strip() and not line.lstrip().startswith("#")
            if is_setting and key.strip() not in named:
                assert "#" in rest, f"{path.name}: {line.strip()} gives no reason"
