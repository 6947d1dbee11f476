"""Which class or architecture holds which recipe, exactly; and what is said where none does.

Shapes: B batch, T time.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from combinations import models
from export_cases import CASES, GGUF_REFUSED, HELD, REFUSED, config_of_case, drawn
from hypothesis import HealthCheck, given, settings
from ruamel.yaml import YAML

from nano_moe import recipe_file
from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.errors import UserError
from nano_moe.export.families import FAMILIES, config_of, family_of, model_of
from nano_moe.export.gguf_file import ARCHITECTURES, architecture_of, check_tokenizer
from nano_moe.export.tensors import without_training
from nano_moe.export.weights import state_of, weights_of
from nano_moe.model.gpt import GPT
from nano_moe.text.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent.parent
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
TRAINABLE = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if {"model", "optim", "trainer"} <= set(recipe_file.read_tree(path).values)
]


@torch.no_grad()
def difference(config: ModelConfig, family: str) -> float:
    """The largest difference between our logits and their class's, with drawn weights."""
    ours = drawn(GPT(config))
    left, state = without_training(config, ours.state_dict(), scales=FAMILIES[family].scales)
    theirs = model_of(family, left, **EAGER)
    theirs.load_state_dict(weights_of(family, left, state))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (3, min(config.context, 48)), generator=generator)
    return (ours(tokens)[0] - theirs(tokens).logits).abs().max().item()


@pytest.mark.parametrize("case", HELD)
def test_a_class_computes_what_the_recipe_does(case):
    config = config_of_case(case)
    family = family_of(config)
    assert family == CASES[case][1]
    assert difference(config, family) < 2e-5


@pytest.mark.parametrize("case", HELD)
def test_weights_come_back_bit_for_bit(case):
    config = config_of_case(case)
    family = family_of(config)
    left, state = without_training(
        config, drawn(GPT(config)).state_dict(), scales=FAMILIES[family].scales
    )
    found = state_of(family, left, weights_of(family, left, state))
    assert found.keys() == state.keys() == GPT(left).state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_dots_holds_what_glm_does_with_normed_heads():
    assert difference(config_of_case("sigmoid, normed, scaled"), "Dots1") < 2e-5


def changed(config: ModelConfig, message: str) -> ModelConfig:
    """The recipe with the fields that a refusal names last."""
    text = message.partition(" is trained with ")[2]
    fields, moe = config.model_dump(), dict(config.moe or {})
    for name, value in re.findall(r"model\.([\w.]+)=(\S+)", text):
        section = moe if name.startswith("moe.") else fields
        section[name.removeprefix("moe.")] = YAML().load(value)
    return ModelConfig(**fields | {"moe": MoEConfig(**moe) if moe else None})


@pytest.mark.parametrize("choose", [family_of, architecture_of], ids=["hf", "gguf"])
@pytest.mark.parametrize("case", sorted({*REFUSED, *GGUF_REFUSED}))
def test_a_refusal_names_the_nearest_recipe_that_is_held(case, choose):
    config = config_of_case(case)
    if CASES[case][1 if choose is family_of else 2] is not None:
        return
    with pytest.raises(UserError, match="no (Hugging Face class|GGUF architecture)") as refused:
        choose(config)
    message = str(refused.value)
    name = re.search(r"one does \((\w+)\)", message)[1]
    nearest = changed(config, message)
    assert choose(nearest) == name
    for field in re.findall(r"(model\.[\w.]+)=", message.partition(": no ")[0]):
        assert f"{field}=" in message.partition(" is trained with ")[2]
    if choose is family_of:
        assert difference(nearest, name) < 2e-5


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(models())
def test_any_recipe_is_held_exactly_or_refused_in_one_line(config):
    try:
        family = family_of(config)
    except UserError as error:
        assert "model." in str(error) and "\n" not in str(error)
        return
    assert difference(config, family) < 5e-5


def test_what_sees_the_future_is_refused_as_such(moe_config):
    for choose in (family_of, architecture_of):
        with pytest.raises(UserError, match="sees the future"):
            choose(moe_config(moe={"routing": "expert_choice"}))


def shrunken(path: Path) -> ModelConfig:
    """A recipe's model at a width of 32, its fields otherwise as they are."""
    fields = recipe_file.load(path, ["data.hub=null", "data.files=x"]).model.model_dump()
    moe = fields["moe"]
    active = moe["top_k"] + moe["n_shared_experts"] if moe else 1
    fields |= {"d_model": 32, "n_heads": 2, "context": 16, "vocab_size": 64, "d_ff": 16 * active}
    if moe:
        moe |= {"init_from": None, "d_expert": None}
    return ModelConfig(**fields)


def exports_to(path: Path) -> tuple[str, str]:
    """The class and the architecture that hold a recipe, or the fields that none holds."""
    found = []
    recipe = recipe_file.load(path, ["data.hub=null", "data.files=x"])
    for choose in (family_of, architecture_of):
        try:
            name = choose(recipe.model)
            found.append(f"{name}ForCausalLM" if choose is family_of else name)
        except UserError as error:
            found.append("refused: " + str(error))
    if recipe.data.tokenizer == "char":
        with pytest.raises(UserError, match="of characters"):
            check_tokenizer(CharTokenizer("ab"))
        found[1] = "refused: data.tokenizer=char"
    return found[0], found[1]


@pytest.mark.parametrize("path", TRAINABLE, ids=lambda p: p.stem)
def test_every_trainable_recipe_is_exported_exactly_or_refused(path):
    config = shrunken(path)
    try:
        family = family_of(config)
    except UserError as error:
        assert re.search(r"model\.[\w.]+", str(error))
        return
    assert difference(config, family) < 2e-5


def test_the_readme_lists_what_every_recipe_exports_to():
    table = (
        (ROOT / "nano_moe/export/README.md")
        .read_text()
        .split("what each recipe exports to")[1]
        .split("\n\n")[1]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    listed = {
        name: (hf, gguf)
        for names, hf, gguf in rows[2:]
        for name in re.findall(r"`([\w/.-]+)`", names)
    }
    expected = {}
    for path in TRAINABLE:
        name = str(path.relative_to(ROOT / "recipes").with_suffix(""))
        hf, gguf = exports_to(path)
        expected[name] = (spelt(hf), spelt(gguf))
    assert listed == expected


def spelt(found: str) -> str:
    """As the table writes it: names in code, of a refusal the first field."""
    refused = re.match(r"refused: (?:model\.)?([\w.]+(?:=[\w.]+)?)", found)
    return f"none: `{refused[1]}`" if refused else f"`{found}`"


def test_every_class_is_reached_by_a_recipe_or_made_for_import():
    assert {family for _, family, _ in CASES.values()} >= set(FAMILIES) - {"Dots1"}
    assert {arch for _, _, arch in CASES.values() if arch} == {a.name for a in ARCHITECTURES}


def test_their_config_says_the_ids_it_is_given():
    made = config_of("Qwen3", config_of_case("dense, normed heads"), bos_token_id=3)
    assert made.bos_token_id == 3
