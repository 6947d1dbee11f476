"""Recipe files: inheritance, overrides, YAML 1.2 typing, and faults that name their line."""

import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from nano_moe import recipe_file
from nano_moe.config import DOMAINS, Recipe
from nano_moe.errors import UserError
from nano_moe.published import Published

BASE = """\
seed: 7
model:
  vocab_size: 512
  context: 64
  n_layers: 2
  d_model: 64
  n_heads: 4
  d_ff: 96
  moe:
    n_experts: 4
    top_k: 2
optim:
  lr: 6e-4
trainer:
  steps: 20
  batch_size: 4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def load(text: str, *overrides: str) -> Recipe:
    with open("x.yaml", "w") as file:
        file.write(text)
    return recipe_file.load("x.yaml", overrides)


def fault(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(text, *overrides)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# --- inheritance ---------------------------------------------------------------------------------


def test_a_recipe_states_only_its_differences_to_its_base():
    plain = load(BASE)
    assert load("base: base.yaml\n") == plain
    changed = load("base: base.yaml\nmodel:\n  moe:\n    n_experts: 8\n  n_layers: 3\n")
    moe = changed.model.moe
    assert (changed.model.n_layers, moe.n_experts, moe.top_k) == (3, 8, 2)
    unchanged = {"seed", "data", "optim", "trainer"}
    assert changed.model_dump(include=unchanged) == plain.model_dump(include=unchanged)


def test_null_replaces_an_inherited_block():
    assert load("base: base.yaml\nmodel:\n  moe: null\n").model.moe is None
    assert load("base: base.yaml\n", "model.moe=null").model.moe is None


def test_a_block_can_return_below_a_null():
    """Three files deep: the top one does not inherit what the middle one took away."""
    with open("dense.yaml", "w") as file:
        file.write("base: base.yaml\nmodel:\n  moe: null\n")
    moe = load("base: dense.yaml\nmodel:\n  moe: {n_experts: 3, top_k: 1}\n").model.moe
    assert (moe.n_experts, moe.top_k, moe.router_z_loss) == (3, 1, 0.0)


def test_lists_replace_and_do_not_grow():
    text = "base: base.yaml\ndata:\n  domains: [law]\n"
    assert load(text).data.domains == ("law",)
    assert load(text, "data.domains=[code_python]").data.domains == ("code_python",)


def test_a_base_is_looked_up_beside_the_file_that_names_it(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "y.yaml").write_text("base: ../base.yaml\nseed: 9\n")
    assert load("base: deep/y.yaml\n").seed == 9


@pytest.mark.parametrize("names", [["x.yaml"], ["y.yaml", "x.yaml"], ["y.yaml", "y.yaml"]])
def test_a_circle_of_bases_is_named(folder, names):
    for name, base in zip(names, names[1:], strict=False):
        (folder / name).write_text(f"base: {base}\n")
    message = fault(f"base: {names[0]}\n")
    assert "base" in message and "circle" in message
    assert all(name in message for name in names)


def test_a_missing_base_is_an_error_at_its_line_with_near_names():
    message = fault("seed: 1\nbase: bose.yaml\n")
    assert message.startswith("x.yaml:2: base: ") and "did you mean base.yaml" in message


@pytest.mark.parametrize("base", ["[base.yaml]", "3", "{a: 1}", "."])
def test_a_base_that_is_not_a_file_name_is_refused(base):
    assert fault(f"base: {base}\n").startswith("x.yaml:1: base: ")


# --- values --------------------------------------------------------------------------------------


def test_yaml_is_typed_as_1_2():
    """`6e-4` is a float and `no` is a string; YAML 1.1 readers get both wrong."""
    assert load(BASE).optim.lr == 0.0006
    assert load(BASE, "optim.lr=6e-4").optim.lr == 0.0006
    assert load(BASE, "trainer.sample_prompt=no").trainer.sample_prompt == "no"
    assert load(BASE + "  sample_prompt: no\n").trainer.sample_prompt == "no"


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("seed=11", None, "seed", 11),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("optim.grad_clip=0", "optim", "grad_clip", 0.0),
        ("trainer.compile=true", "trainer", "compile", True),
        ("model.n_kv_heads=2", "model", "n_kv_heads", 2),
        ("model.n_kv_heads=", "model", "n_kv_heads", None),
        ("model.n_kv_heads=null", "model", "n_kv_heads", None),
        ("trainer.sample_prompt='12'", "trainer", "sample_prompt", "12"),
        ("trainer.sample_prompt='a = b'", "trainer", "sample_prompt", "a = b"),
        ("trainer.sample_prompt=a=b", "trainer", "sample_prompt", "a=b"),
        ("data.files=[a.txt, b]", "data", "files", ("a.txt", "b")),
        ("data.files=a.txt", "data", "files", ("a.txt",)),
    ],
)
def test_an_override_is_read_as_yaml_and_sets_one_field(override, section, field, value):
    recipe, plain = load(BASE, override), load(BASE)
    holder = recipe if section is None else getattr(recipe, section)
    found = getattr(holder, field)
    assert found == value and type(found) is type(value)
    kept = {"model", "optim", "trainer", "seed"} - {section or field}
    assert recipe.model_dump(include=kept) == plain.model_dump(include=kept)


def test_later_overrides_win():
    assert load(BASE, "seed=1", "seed=2").seed == 2


def test_own_files_replace_the_embedded_domains():
    assert load(BASE).data.domains == DOMAINS
    assert load(BASE, "data.files=a.txt").data.domains == ()


@pytest.mark.parametrize("path", ["base.yaml", "x.yaml"])
def test_what_is_dumped_loads_as_an_equal_recipe(path):
    text = "base: base.yaml\noptim: {lr: 3e-3}\ntrainer: {sample_prompt: 'no: #1'}"
    load(text, "data.files=[a.txt]")
    recipe = recipe_file.load(path, ["data.files=['a b.txt', c]"] if path == "x.yaml" else [])
    dumped = recipe_file.dump(recipe)
    assert "base" not in dumped
    assert load(dumped) == recipe
    assert recipe_file.dump(load(dumped)) == dumped


PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lr=st.floats(1e-12, 1e6),
    decay=st.floats(0, 1e3),
    prompt=PROMPTS,
    files=st.lists(PROMPTS.filter(bool), max_size=3),
    seed=st.integers(0, 2**40),
)
def test_every_recipe_survives_dump_and_load(lr, decay, prompt, files, seed):
    values = load(BASE).model_dump()
    values["seed"] = seed
    values["optim"] |= {"lr": lr, "weight_decay": decay}
    values["trainer"]["sample_prompt"] = prompt
    values["data"] |= {"files": files, "domains": [] if files else ["law"]}
    recipe = Recipe.model_validate(values)
    with open("dumped.yaml", "w", encoding="utf-8", newline="") as file:
        file.write(recipe_file.dump(recipe))
    assert recipe_file.load("dumped.yaml") == recipe


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "change", "parts"),
    [
        (9, ("moe:", "mo:"), ["model.mo: no such field", "did you mean 'moe'?"]),
        (10, ("n_experts:", "n_expert:"), ["model.moe.n_expert: no such field", "'n_experts'?"]),
        (13, ("lr:", "learning: 1\n  lr:"), ["optim.learning: no such", "there are name, lr"]),
        (6, ("d_model: 64", "d_model: 1e3"), ["model.d_model: must be a whole number", "1000.0"]),
        (6, ("d_model: 64", "d_model: '64'"), ["model.d_model: must be a whole number", '"64"']),
        (6, ("d_model: 64", "d_model: true"), ["model.d_model: must be a whole number", "true"]),
        (6, ("d_model: 64", "d_model: [64]"), ["model.d_model: must be a whole number"]),
        (6, ("d_model: 64", "d_model:"), ["model.d_model: must be a whole number", "null"]),
        (13, ("lr: 6e-4", "lr: fast"), ["optim.lr: must be a number", '"fast"']),
        (13, ("lr: 6e-4", "lr: .nan"), ["optim.lr: must be a finite number"]),
        (13, ("lr: 6e-4", "lr: .inf"), ["optim.lr: must be a finite number"]),
        (13, ("lr: 6e-4", "lr: 0"), ["optim.lr: ", "greater than 0"]),
        (12, ("optim:\n  lr: 6e-4", "optim: 3"), ["optim: must be a block of fields"]),
        (4, ("context: 64", "context: 64\n  context: 32"), ["written twice"]),
        (11, ("top_k: 2", "top_k: 5"), ["model.moe.top_k: ", "5", "n_experts=4", "at most 4"]),
        (7, ("n_heads: 4", "n_heads: 5"), ["model.n_heads: ", "n_heads=5", "d_model=64"]),
        (3, ("vocab_size: 512", "vocab_size: 512\n  n_kv_heads: 3"), ["n_kv_heads=3", "n_heads=4"]),
        (8, ("d_ff: 96", "d_ff: 97"), ["model.moe.d_expert", "d_ff=97", "96 or 98"]),
        (14, ("steps: 20\n", ""), ["trainer.steps: missing"]),
        (16, ("steps: 20", "steps: 20\n  devices: two"), ["trainer.devices: ", "or auto", '"two"']),
    ],
)
def test_a_fault_is_one_line_with_file_line_field_and_remedy(line, change, parts):
    """`line` is where the fault stands after the change, or the nearest block that holds it."""
    text = BASE.replace(*change, 1)
    assert text != BASE
    message = fault(text)
    for part in parts:
        assert part in message
    where = int(re.match(r"x\.yaml:(\d+): ", message)[1])
    if "written twice" in message:
        assert "context" in message and where == 5
    elif "d_expert" in message:
        assert where in (8, 9)  # d_ff, or the block in which d_expert is omitted
    elif "n_kv_heads" in message:
        assert where == 4
    else:
        assert where == line


def test_a_fault_in_a_base_names_the_base(folder):
    (folder / "base.yaml").write_text(BASE.replace("d_ff: 96", "d_ff: many"))
    assert fault("base: base.yaml\nseed: 1\n").startswith("base.yaml:8: model.d_ff: ")


def test_a_misspelt_section_and_a_misplaced_field_are_told_apart():
    assert "did you mean 'trainer'?" in fault(BASE.replace("trainer:", "trainers:"))
    assert "did you mean 'model.moe.top_k'?" in fault(BASE, "model.top_k=1")


def test_several_faults_are_counted_on_the_line_of_the_first():
    message = fault(BASE.replace("d_model: 64", "d_model: a").replace("d_ff: 96", "d_ff: b"))
    assert message.startswith("x.yaml:6: model.d_model") and message.endswith("(and 1 more)")


def test_duplicate_keys_of_blocks_are_refused():
    message = fault(BASE + "model:\n  n_layers: 3\n")
    assert message.startswith("x.yaml:17: model: written twice")


@pytest.mark.parametrize(
    "override",
    ["model.n_layer=3", "modle.n_layers=3", "n_layers=3", "model.n_layers.x=3", "a.b.c.d=1"],
)
def test_an_override_of_an_unknown_field_is_refused_by_name(override):
    message = fault(BASE, override)
    assert override in message and override.partition("=")[0].rpartition(".")[0] in message


@pytest.mark.parametrize(
    "override",
    ["model", "=3", "model.=3", ".x=3", "model.moe={top_k: 1}", "seed=[1", "seed=a: b: c"],
)
def test_a_malformed_override_is_quoted_back(override):
    assert override in fault(BASE, override)


@pytest.mark.parametrize("d_ff", [7, 101, 250])
@pytest.mark.parametrize("shared", [0, 1])
def test_the_widths_that_a_remainder_names_are_the_nearest_that_load(d_ff, shared):
    overrides = [f"model.moe.n_shared_experts={shared}", "model.moe.top_k=3"]
    message = fault(BASE, f"model.d_ff={d_ff}", *overrides)
    named = {int(n) for n in re.findall(r"\d+", message.split("nearest d_ff:")[1])}
    active = 3 + shared
    fits = [n for n in range(1, 400) if n % active == 0]
    below, above = [n for n in fits if n < d_ff], [n for n in fits if n > d_ff]
    assert named == {*below[-1:], above[0]}
    for width in named:
        model = load(BASE, f"model.d_ff={width}", *overrides).model
        assert model.expert_width * active == width


def test_an_unknown_domain_lists_the_known_ones():
    message = fault(BASE, "data.domains=[law, physics]")
    assert "data.domains: " in message and "'physics'" in message
    assert all(name in message for name in DOMAINS)


@pytest.mark.parametrize(
    "change",
    [
        "moe.normalize_top_k=true moe.top_k=1",
        "moe.bias_update_rate=0.1",
        "moe.first_k_dense=2",
        "moe.every_n_layers=3",
        "head_dim=7",
        "moe.top_k=0",
        "moe.score=gumbel",
        "moe.n_groups=3 moe.n_experts=8",
        "moe.top_k_groups=2",
        "moe.top_k_groups=1 moe.n_groups=4 moe.n_experts=4 moe.top_k=2",
        "moe.group_score=top2_sum moe.n_groups=4 moe.n_experts=4 moe.top_k_groups=2 moe.top_k=2",
        "moe.group_score=top2_sum",
        "moe.bias_rule=error",
        "moe.balance_scope=sequence moe.routing=hash",
        "moe.router_window=65",
        "moe.shared_expert_gate=true",
        "moe.bias_update_rate=2 moe.score=sigmoid",
        "moe.capacity_factor=1e30",
        "moe.router_jitter=1",
        "moe.capacity_factor=0",
        "moe.capacity_factor=1.0 moe.routing=expert_choice moe.load_balancing_loss=0",
        "moe.load_balancing_loss=0.1 moe.routing=expert_choice",
        "moe.load_balancing_loss=0.1 moe.routing=hash",
        "moe.router_z_loss=0.1 moe.routing=hash moe.load_balancing_loss=0",
        "moe.noisy_top_k=true moe.routing=hash moe.load_balancing_loss=0",
        "moe.router_window=2 moe.routing=hash moe.load_balancing_loss=0",
        "moe.train_router=false moe.routing=hash moe.load_balancing_loss=0",
        "moe.noisy_top_k=true moe.train_router=false",
        "moe.init_from=dense moe.top_k=1",
        "moe.init_from=dense moe.routed_scaling_factor=2.5",
        "moe.init_from=dense moe.n_shared_experts=1",
        "moe.init_from=dense moe.capacity_factor=2.0",
        "moe.init_from=dense moe.n_experts=1 moe.top_k=1 moe.score=sigmoid",
        "moe.d_expert=8 moe.init_from=dense",
        "mla.kv_lora_rank=8",
        "mla.qk_rope_head_dim=3 mla.kv_lora_rank=8 mla.qk_nope_head_dim=4 mla.v_head_dim=4",
        "qk_norm=true mla.kv_lora_rank=8 mla.qk_nope_head_dim=4 mla.qk_rope_head_dim=4 "
        "mla.v_head_dim=4",
        "activation=relu",
    ],
)
def test_settings_that_contradict_each_other_name_a_field_of_the_contradiction(change):
    overrides = [f"model.{part}" for part in change.split()]
    assert overrides[0].partition("=")[0] in fault(BASE, *overrides)


def test_text_is_named_once_and_momentum_is_of_muon():
    for own in ("data.files=a.txt", "data.hub.dataset=a/b"):
        message = fault(BASE, "data.domains=[law, religion]", own)
        assert "data.domains: " in message and "instead of law, religion" in message
        assert load(BASE, "data.domains=[]", own).data.domains == ()
    assert "optim.momentum: 0.9 is Muon's" in fault(BASE, "optim.momentum=0.9", "optim.name=adamw")
    assert load(BASE, "optim.name=adamw", "optim.momentum=0.95").optim.name == "adamw"


def test_warm_up_longer_than_the_training_is_refused():
    message = fault(BASE, "optim.warmup_steps=20")
    assert "optim.warmup_steps" in message and "trainer.steps=20" in message


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "- a\n", "just words", "a: [1", "a: b: c", "\t", "a: \x00", "&a *a"]
)
def test_text_that_is_no_mapping_is_refused_with_its_file(text):
    assert fault(text).startswith("x.yaml:")


def test_a_file_that_is_not_utf8_is_refused(folder):
    (folder / "x.yaml").write_bytes("seed: 1 # é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.yaml: not UTF-8 text at byte 10"):
        recipe_file.load("x.yaml")


def test_a_missing_recipe_names_near_files(folder):
    with pytest.raises(UserError, match=r"bse\.yaml: no such recipe; did you mean .*base\.yaml\?"):
        recipe_file.load("bse.yaml")
    with pytest.raises(UserError, match="not a file"):
        recipe_file.load(".")


def test_aliases_that_multiply_are_refused_quickly():
    """Nine levels of nine aliases: a third of a kilobyte, 400 million values."""
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 9):
        levels.append(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]")
    begun = time.perf_counter()
    assert "expands to more than" in fault("\n".join(levels))
    assert time.perf_counter() - begun < 5


def test_an_alias_of_itself_and_nesting_without_end_are_refused():
    assert "x.yaml" in fault("model: &m\n  inner: *m\n")
    assert "nested without end" in fault(BASE, "seed=&a [*a]")
    assert "x.yaml: not YAML" in fault("[" * 1000)


def test_merge_keys_count_as_written_and_faults_in_them_name_their_block():
    merged = BASE.replace("  lr: 6e-4", "  <<: {lr: 0.5, grad_clip: 2}\n  lr: 6e-4")
    assert (load(merged).optim.lr, load(merged).optim.grad_clip) == (6e-4, 2.0)
    message = fault(merged.replace("grad_clip", "grad_clop"))
    assert message.startswith("x.yaml:12: optim.grad_clop: no such field")


@pytest.mark.parametrize("value", ["true", "-1", "2.5", "2001-01-01"])
def test_files_that_are_no_list_of_names_are_refused(value):
    assert "data.files" in fault(BASE, f"data.files={value}")


def test_a_file_too_large_for_a_recipe_is_refused(folder):
    (folder / "big.yaml").write_text("#" * 100_001)
    with pytest.raises(UserError, match=r"big\.yaml: larger than 100000 bytes"):
        recipe_file.load("big.yaml")


SCRAPS = st.sampled_from(
    ["model", "moe", "data", "seed", "base", "lr", ":", ": ", "\n", "\n  ", "- ", "[", "]", "{"]
    + ["&a ", "*a", "!!int ", "!!python/object:os.system ", "'", '"', "|", ">", "#", "?", "<<", "%"]
    + ["}", "0x", "1e9", "-", "null", "~", "2001-01-01", ".inf", ",", "@", "`", "\u2028", "\\", "="]
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(SCRAPS | st.text(max_size=3), max_size=12).map("".join))
def test_whatever_is_written_there_is_a_recipe_or_a_fault_of_one_line(text):
    for source, overrides in ((BASE + text, ()), (text, ()), (BASE, (f"seed={text}", text))):
        try:
            tree = recipe_file.parse(source, "x.yaml")
            for override in overrides:
                tree = recipe_file.merge(tree, recipe_file.parse_override(override))
            recipe_file.validate(tree, "x.yaml", Recipe)
        except UserError as error:
            assert str(error)


# --- the schema ----------------------------------------------------------------------------------


def sections(annotation: Any) -> list[type[BaseModel]]:
    """Sections in an annotation such as `MoE | None` or `tuple[Listing, ...]`, and in those."""
    inner = getattr(annotation, "__args__", ())
    found = []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        found.append(annotation)
        inner = [field.annotation for field in annotation.model_fields.values()]
    return found + [section for each in inner for section in sections(each)]


@pytest.mark.parametrize(("root", "n"), [(Recipe, 8), (Published, 6)])
def test_every_field_is_described_and_every_section_documented(root, n):
    assert len(sections(root)) == n
    for section in sections(root):
        assert section.__doc__
        for name, field in section.model_fields.items():
            is_section = any(field.annotation in (s, s | None) for s in sections(root))
            assert field.description or is_section, f"{section.__name__}.{name}"


def test_a_recipe_is_frozen_and_hashable():
    recipe: Any = load(BASE)
    assert len({recipe, load(BASE)}) == 1
    for section, field in ((recipe, "seed"), (recipe.model, "d_ff"), (recipe.model.moe, "top_k")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, field, 1)
