"""The gpu tier: every study at GPT-2 small's size is fair, counts, and has the shapes it should."""

import functools
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nano_moe.accounting import count
from nano_moe.bench.recipes import FOLDER
from nano_moe.cli.main import main
from nano_moe.config import ModelConfig
from nano_moe.model.gpt import GPT
from nano_moe.recipe_file import load
from nano_moe.studies import catalogue, tiers
from nano_moe.training.module import Decoder

STUDIES = catalogue.everything()
PAIRS = ("base", "dense", "mixtral", "deepseek")


@pytest.mark.parametrize("name", PAIRS)
def test_a_small_recipe_enlarged_is_the_one_under_gpu(name):
    found = tiers.larger(load(FOLDER / f"{name}.yaml", ["trainer.precision=bf16"]))
    expected = load(FOLDER / "gpu" / f"{name}.yaml")
    free = {"optim": {"lr"}, "model": {"d_ff"}} if name == "dense" else {}  # tuned, and absorbing
    assert found.model_dump(exclude=free) == expected.model_dump(exclude=free)


def test_the_pair_has_equal_active_weights_of_gpt_2_smalls_number():
    counted = {name: count(load(FOLDER / "gpu" / f"{name}.yaml")) for name in PAIRS[1:]}
    active = [one.active_params for one in counted.values()]
    assert max(active) / min(active) < 1.005
    assert 123e6 < min(active) < 125e6
    assert counted["mixtral"].total_params == pytest.approx(293.5e6, rel=1e-3)


@pytest.mark.parametrize("name", PAIRS[1:])
def test_it_fits_the_card_that_it_names(name):
    cost = tiers.cost(load(FOLDER / "gpu" / f"{name}.yaml"))
    assert cost.memory_bytes < 0.8 * SMALL_CARD
    assert cost.tokens == pytest.approx(1.31e9, rel=1e-2)
    assert cost.flops > 6 * 85e6 * cost.tokens  # of all weights but the embedding's


CARD, SMALL_CARD = 80e9, 24e9  # bytes: what recipes/gpu/README.md promises
ABOVE_THE_SMALL = {"expert-count": {"E = 64"}}  # as it says, too
QUICK = ("sparse-vs-dense", "upcycling", "memory-vs-compute")
ALL = [
    pytest.param(one, id=one.name, marks=[] if one.name in QUICK else pytest.mark.slow)
    for one in STUDIES
]


@pytest.mark.parametrize("found", ALL)
def test_every_study_is_as_fair_as_its_small_one(found):
    few = found.study.model_copy(update={"seeds": found.study.seeds[:2]})
    larger = found._replace(study=few).larger
    planned = larger.plan()
    larger.check_fair(planned)
    assert larger.results.parent.name == "gpu"
    trained = {one.member: one.recipe for one in planned if not one.measure}
    memory = {name: tiers.cost(recipe).memory_bytes for name, recipe in trained.items()}
    assert max(memory.values(), default=0) < 0.5 * CARD
    above = {name for name, n_bytes in memory.items() if n_bytes > SMALL_CARD}
    assert above == ABOVE_THE_SMALL.get(found.name, set())
    for recipe in {recipe.model: recipe for recipe in trained.values()}.values():
        assert recipe.model.context == 1024 and recipe.trainer.compile
        assert recipe.data.hub is not None
        model = recipe.model
        if model.moe is not None and model.moe.init_from is not None:
            moe = model.moe.model_copy(update={"init_from": None})
            model = model.model_copy(update={"moe": moe})
        assert count(recipe).total_params == parameters_of(model)


@functools.cache
def parameters_of(model: ModelConfig) -> int:
    """Of the decoder, once the forward pass of two of its layers has the shape that it should."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        built = GPT(model.model_copy(update={"n_layers": 2}))
        logits = built(torch.zeros(1, 8, dtype=torch.int64))[0]
    assert logits.shape == (1, 8, 50304)
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(model).parameters())


def test_ratios_are_kept():
    found = catalogue.find("sparse-vs-dense").larger
    assert "top-2, equal time" not in found.study.members
    recipes = {one.member: one.recipe for one in found.plan()}
    assert recipes["dense-total"].model.d_ff == 4 * recipes["dense"].model.d_ff == 8192
    assert recipes["dense-total"].optim.lr == recipes["dense"].optim.lr / 2
    grid = catalogue.find("learning-rates")
    values, larger = grid.study.grid.values, grid.larger
    rates = {one.member: one.recipe.optim.lr for one in larger.plan()}
    assert larger.study.grid.values == tuple(pytest.approx(0.4 * value) for value in values)
    for value in larger.study.grid.values:
        assert rates[f"dense @ {value:g}"] == value


@pytest.mark.parametrize("name", PAIRS[1:])
def test_a_narrow_one_of_the_same_making_steps(name):
    small = ("d_model=32", "n_heads=2", "context=16", "vocab_size=64", "n_layers=1", "d_ff=32")
    recipe = load(FOLDER / "gpu" / f"{name}.yaml", [f"model.{field}" for field in small])
    module = Decoder(recipe)
    optimizer = module.configure_optimizers()[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        output = module.training_step(torch.randint(0, 64, (2, 17)), 0)
    output["loss"].backward()
    module.on_before_optimizer_step(optimizer)
    optimizer.step()
    assert torch.isfinite(output["loss"])


def test_the_command_says_what_is_an_estimate(capsys):
    assert main(["study", "count", "sparse-vs-dense", "--tier", "gpu"]) == 0
    said = capsys.readouterr().out
    assert "dense-total" in said and "not run by us" in said and "312 TFLOP/s" in said
    assert main(["study", "count", "sparse-vs-dense", "--tier", "gpu", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["members"]
    assert members["top-2"]["runs"] == 5 and members["top-2"]["tokens"] == 2500 * 2**19
    assert main(["study", "count", "sparse-vs-dense"]) == 2
    assert "takes only --tier gpu" in capsys.readouterr().err
