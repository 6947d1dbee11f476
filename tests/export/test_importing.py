"""The way back: what an imported folder computes, and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import ONE_OF_EACH, SIZES, config_of_case
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from nano_moe import checkpoints, recipe_file, runs
from nano_moe.accounting import count
from nano_moe.config import ModelConfig, Recipe
from nano_moe.errors import UserError
from nano_moe.export import configs, importing
from nano_moe.export.hugging_face import export
from nano_moe.export.weights import Traits, traits_of
from nano_moe.runs import Run
from nano_moe.text.store import prepare
from nano_moe.text.tokenizer import ByteTokenizer, CharTokenizer


@pytest.fixture
def folder(run_of, tmp_path, monkeypatch):
    """folder(case) -> an export of that recipe, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)

    def make(case: str, tokenizer=None) -> Path:
        run, _ = run_of(config_of_case(case), tokenizer)
        export(run, Path("out"))
        return Path("out")

    return make


def taken_in(folder: Path, name: str = "back") -> Run:
    source = importing.read(folder)
    recipe = importing.recipe_of(source, None, folder)
    return importing.import_run(source, recipe, folder, name=name, corpus=None)


def model_of(source: importing.Source) -> ModelConfig:
    traits = traits_of(source.weights)
    return configs.model_of_config(source.family, source.config, traits, Path("config.json"))


def edited(folder: Path, **fields) -> Path:
    """The folder with other fields in its config; None removes one."""
    path = folder / "config.json"
    said = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return folder


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_folder_of_ours_comes_back_bit_for_bit(folder, case):
    found = taken_in(folder(case))
    original = Run(Path("run"))
    recipe, model, step = checkpoints.load_model(found)
    _, theirs, _ = checkpoints.load_model(original)
    tokens = torch.randint(0, 264, (2, 40))
    with torch.no_grad():
        ours, wanted = model(tokens)[0], theirs(tokens)[0]
    if "scaled" in case and "sigmoid" not in case:
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)  # folded, so rounded once
    else:
        assert torch.equal(ours, wanted)
    assert step == 4
    assert found.tokenizer_file.read_bytes() == original.tokenizer_file.read_bytes()
    assert recipe.data == original.recipe().data
    assert found.manifest()["corpus"] == original.manifest()["corpus"]
    assert found.manifest()["imported"]["run"] == "run"
    export(found, Path("again"))
    assert (
        Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    )
    assert Path("again/config.json").read_bytes() == Path("out/config.json").read_bytes()


@pytest.mark.parametrize("case", ["sparse", "shared", "normed, shared", "sigmoid, groups", "gated"])
def test_without_our_own_file_the_config_says_the_same_recipe(folder, case):
    place = folder(case)
    (place / "nano_moe.json").unlink()
    found = model_of(importing.read(place))
    wanted = config_of_case(case)
    assert found.moe.normalizes == wanted.moe.normalizes
    for field in (
        *("n_experts", "top_k", "n_shared_experts", "shared_expert_gate", "first_k_dense"),
        *("score", "n_groups", "group_score", "routed_scaling_factor"),
    ):
        assert getattr(found.moe, field) == getattr(wanted.moe, field), field
    assert found.expert_width == wanted.expert_width
    assert (found.head_size, found.kv_heads) == (wanted.head_size, wanted.kv_heads)


# A recipe, fields of its exported config, and the field that the refusal names.
SAYS_MORE = {
    "biases": ("dense", {"attention_bias": True}, "attention_bias"),
    "another activation": ("dense", {"hidden_act": "gelu"}, "hidden_act"),
    "scaled positions": (
        "dense",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_parameters",
    ),
    "the old name of scaled positions": (
        "dense",
        {
            "rope_parameters": None,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_theta": 10000.0,
        },
        "rope_parameters",
    ),
    "a window": (
        "dense, normed heads",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "sliding_window",
    ),
    "a window in every layer": ("sparse", {"sliding_window": 8}, "sliding_window"),
    "a half of each head turned": (
        "sigmoid",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        "rope_parameters",
    ),
    "a field of tomorrow": ("normed", {"router_logit_softcapping": 30.0}, "router_logit"),
    "some layers dense": ("normed", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    "linear attention": (
        "normed, shared",
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        "layer_types",
    ),
    "all layers dense": ("normed", {"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
    "later layers dense": ("shared", {"moe_layer_end_index": 1}, "moe_layer_end_index"),
    "another class": ("dense", {"architectures": ["OlmoeForCausalLM"]}, "architectures: Olmoe"),
    "no class": ("dense", {"architectures": None}, "architectures: None"),
    "a class in a list": ("dense", {"architectures": [["x"]]}, r"architectures: \['x'\] is none"),
    "a class by number": ("dense", {"architectures": {"a": 1}}, "architectures: {'a': 1} is none"),
    "no classes": ("dense", {"architectures": []}, r"architectures: \[\] is none"),
    "another model type": ("dense", {"model_type": "qwen2"}, "model_type qwen2 is not of Llama"),
    "a value of another kind": ("dense", {"hidden_size": "wide"}, "not a config"),
    "a width that does not divide": ("sparse", {"num_key_value_heads": 3}, "n_kv_heads"),
}


@pytest.mark.parametrize("case, fields, part", SAYS_MORE.values(), ids=SAYS_MORE)
def test_what_our_decoder_does_not_compute_is_refused_by_name(folder, case, fields, part):
    place = edited(folder(case), **fields)
    (place / "nano_moe.json").unlink()
    with pytest.raises(UserError, match=part) as refused:
        importing.read(place)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("out")
    assert not Path("checkpoints").exists()


def test_epsilons_that_a_class_ignores_are_refused(folder):
    place = edited(folder("latent, sigmoid"), rms_norm_eps=1e-5)
    (place / "nano_moe.json").unlink()
    with pytest.raises(UserError, match="DeepseekV3 computes this otherwise.*norm_eps"):
        importing.read(place)


def test_a_config_changed_under_its_recipe_is_refused(folder):
    place = edited(folder("normed"), norm_topk_prob=False)
    source = importing.read(place)
    with pytest.raises(UserError, match="nano_moe.json: .*another norm_topk_prob"):
        importing.recipe_of(source, None, place)
    (place / "nano_moe.json").unlink()
    assert not model_of(importing.read(place)).moe.normalizes


def change_weights(place: Path, change) -> None:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_grew_what_their_recipe_lacks_are_refused(folder):
    """Trained on elsewhere, a gate that we left at 0 may have moved."""
    place = folder("normed, shared")
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    change_weights(place, lambda tensors: tensors[name].add_(0.1))
    source = importing.read(place)
    with pytest.raises(UserError, match="shared_expert_gate.weight is not zero"):
        importing.import_run(
            source, importing.recipe_of(source, None, place), place, name="b", corpus=None
        )
    change_weights(place, lambda t: t["model.layers.0.self_attn.q_proj.weight"].add_(0.1))
    source = importing.read(place)
    with pytest.raises(UserError, match="gates attention"):
        importing.import_run(
            source, importing.recipe_of(source, None, place), place, name="b", corpus=None
        )
    assert not list(Path("checkpoints").glob("*"))


def _pickled(place: Path) -> None:
    (place / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, place / "pytorch_model.bin")


def _truncated(place: Path) -> None:
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def _pickled_shard(place: Path) -> None:
    """As an index of shards may name it, with a safetensors file beside it."""
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").rename(place / "other.safetensors")
    torch.save(tensors, place / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _elsewhere(place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").rename(place.parent / "x.safetensors")
    save_file({"x": torch.ones(1)}, place / "y.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../x.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def _replaced(name: str, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


NORM = "model.norm.weight"
SPOILT = {
    "a pickle as a shard": (_pickled_shard, r"weight_map: pytorch_model.bin: only \*.safetensors"),
    "a shard elsewhere": (_elsewhere, "weight_map: ../x.safetensors: only"),
    "another head than the tied one": (
        lambda p: change_weights(p, _other_head),
        "config.json ties lm_head",
    ),
    "not finite": (
        lambda p: change_weights(p, _replaced(NORM, lambda w: w * float("nan"))),
        "norm.weight: 32 of 32 numbers are not finite",
    ),
    "integers": (
        lambda p: change_weights(p, _replaced(NORM, lambda w: w.to(torch.int8))),
        "model.norm.weight: of I8",
    ),
    "another shape": (
        lambda p: change_weights(p, _replaced(NORM, lambda w: w[:-1].clone())),
        "mismatched keys, 1 of them, first .*model.norm.weight",
    ),
    "weights of another name": (
        lambda p: edited(p, transformers_weights="x.safetensors"),
        "transformers_weights: no field",
    ),
    "a thousand million labels": (lambda p: edited(p, num_labels=10**9), "num_labels: no field"),
    "a tokenizer of brackets": (
        lambda p: (p / "tokenizer.json").write_text("[" * 200_000),
        "tokenizer.json: not a readable",
    ),
    "pickled": (_pickled, "only pytorch_model.bin, which is never unpickled"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "holds no weights"),
    "truncated": (_truncated, "model.safetensors: cannot be read"),
    "one tensor less": (
        lambda p: change_weights(p, lambda t: t.pop("model.norm.weight")),
        "missing keys, 1 of them, first model.norm.weight",
    ),
    "one tensor more": (
        lambda p: change_weights(
            p, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
        ),
        "unexpected keys, 1 of them, first model.layers.0.self_attn.q_proj.bias",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json: missing"),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: not JSON"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json: not a readable"),
    "a foreign file of our name": (
        lambda p: (p / "nano_moe.json").write_text('{"schema": 1}'),
        "nano_moe.json: not what an export writes",
    ),
    "a newer file": (
        lambda p: (p / "nano_moe.json").write_text('{"schema": 2}'),
        "nano_moe.json: schema 2, this version reads 1",
    ),
}


@pytest.mark.parametrize("spoil, part", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_folder_is_refused_and_no_run_is_made(folder, spoil, part):
    place = folder("dense")
    spoil(place)
    with pytest.raises(UserError, match=part) as refused:
        taken_in(place)
    assert "\n" not in str(refused.value)
    assert not Path("checkpoints").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        importing.read(tmp_path / "nowhere")


def test_an_existing_run_is_not_overwritten(folder):
    place = folder("dense")
    taken_in(place, "back")
    before = Path("checkpoints/back/best.ckpt").read_bytes()
    with pytest.raises(UserError, match="exists and is not overwritten"):
        taken_in(place, "back")
    assert Path("checkpoints/back/best.ckpt").read_bytes() == before


def foreign_recipe(recipe_of, dense_config, text: Path, tokenizer: str) -> Recipe:
    data = {"files": (str(text),), "tokenizer": tokenizer, "cache": "cache", "val_fraction": 0.2}
    return recipe_of(dense_config(vocab_size=264), data=data)


def test_a_foreign_folder_needs_a_recipe_for_its_text(folder, recipe_of, dense_config):
    place = folder("dense", ByteTokenizer())
    (place / "nano_moe.json").unlink()
    source = importing.read(place)
    with pytest.raises(UserError, match="--recipe"):
        importing.recipe_of(source, None, place)
    text = Path("text.txt")
    text.write_text("\n".join(f"the fox saw {i} hens" for i in range(200)))
    rest = foreign_recipe(recipe_of, dense_config, text, "byte")
    source = importing.read(place, rest)
    recipe = importing.recipe_of(source, rest, place)
    assert recipe.data == rest.data and recipe.model.d_model == SIZES["d_model"]
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)
    run = importing.import_run(source, recipe, place, name="back", corpus=corpus)
    runs.check_corpus(run, corpus)
    assert recipe_file.load(run.recipe_file) == recipe


@pytest.mark.parametrize("case", ["dense", "normed", "latent, sigmoid"])
@torch.no_grad()
def test_fewer_positions_compute_as_the_first_of_many(folder, case):
    """Rotations depend on the position alone, so weights and their first logits stay."""
    place = folder(case)
    source = importing.read(place)
    whole = importing.recipe_of(source, None, place)
    recipe = importing.recipe_of(source, None, place, context=16)
    assert recipe == whole.model_copy(update={"model": recipe.model})
    assert recipe.model == whole.model.model_copy(update={"context": 16})
    run = importing.import_run(source, recipe, place, name="short", corpus=None)
    assert recipe_file.load(run.recipe_file) == recipe
    assert run.manifest()["imported"]["context"] == whole.model.context
    _, short, _ = checkpoints.load_model(run)
    _, long, _ = checkpoints.load_model(taken_in(place))
    tokens = torch.randint(0, 264, (2, 16))
    assert torch.equal(short(tokens)[0], long(tokens)[0])
    with pytest.raises(ValueError, match="16"):
        short(torch.zeros(1, 17, dtype=torch.int64))
    export(run, Path("again"))
    assert json.loads(Path("again/config.json").read_text())["max_position_embeddings"] == 16


@pytest.mark.parametrize("context", [-1, 0, 41, 10**9])
def test_more_positions_than_the_config_has_are_refused(folder, context):
    place = folder("dense")
    longest = json.loads((place / "config.json").read_text())["max_position_embeddings"]
    context = longest + 1 if context == 41 else context
    with pytest.raises(UserError, match=f"^--context {context}: .*: {longest}; name 2 to") as no:
        importing.recipe_of(importing.read(place), None, place, context=context)
    assert "\n" not in str(no.value)


def test_text_of_another_tokenizer_is_refused(folder, recipe_of, dense_config):
    place = folder("dense", CharTokenizer("abcdefgh \n"))
    (place / "nano_moe.json").unlink()
    Path("text.txt").write_text("\n".join(f"the fox saw {i} hens" for i in range(200)))
    with pytest.raises(UserError, match="tokenizer.json: its model is WordLevel; BPE alone"):
        importing.read(place, foreign_recipe(recipe_of, dense_config, Path("text.txt"), "byte"))
    rest = foreign_recipe(recipe_of, dense_config, Path("text.txt"), "char")
    source = importing.read(place, rest)
    recipe = importing.recipe_of(source, rest, place)
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)
    with pytest.raises(UserError, match="12 ids and is not the one of cache.*char, 24"):
        importing.import_run(source, recipe, place, name="back", corpus=corpus)
    assert not list(Path("checkpoints").glob("*"))


# Published configs, as their authors wrote them, and the parameters that they have.
PUBLISHED = {
    "Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.36.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("said, parameters", PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_config_is_read_as_its_authors_meant_it(tmp_path, recipe_of, said, parameters):
    (tmp_path / "config.json").write_text(json.dumps(said))
    family, config = importing._config(tmp_path)
    model = model_of(importing.Source(family, config, {}, ByteTokenizer(), None))
    assert count(recipe_of(model)).total_params == parameters


def test_only_weights_tell_a_bias_from_none(tmp_path):
    said = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = AutoConfig.from_pretrained(tmp_path)
    for biased in (True, False):
        traits = Traits(biased=biased, gated=False, shared=True)
        fields = configs.expert_fields("Glm4Moe", config, traits)
        assert (fields["bias_update_rate"] > 0) is biased
