"""A Hugging Face folder as a run: the way back for the classes that we export to."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from nano_moe import recipe_file, runs
from nano_moe.config import FieldFault, MLAConfig, ModelConfig, MoEConfig, Recipe
from nano_moe.errors import UserError
from nano_moe.export import fast_tokenizer
from nano_moe.export.families import FAMILIES, TARGETS, config_of
from nano_moe.export.hugging_face import PROVENANCE, SCHEMA, creating_export, load, quiet
from nano_moe.export.weights import GATED, Traits, state_of, traits_of
from nano_moe.files import replacing, write_text
from nano_moe.model.gpt import GPT
from nano_moe.runs import Run
from nano_moe.text.store import Corpus
from nano_moe.text.tokenizer import Tokenizer, check_fits

# What a config may say without a word to what is computed in evaluation.
SILENT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
}
# The linear attention that Qwen3-Next has where `layer_types` says so.
UNSEEN = Traits(biased=False, gated=True, shared=True)  # before weights are read
SILENT |= {
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
}


class Source(NamedTuple):
    """A folder, read and understood, but for the weights' place in our decoder."""

    family: str
    config: Any  # theirs
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    provenance: dict[str, Any] | None  # what an export of ours says of its run


def read(folder: Path) -> Source:
    """Config, weights and tokenizer of a folder; raises UserError where one is none of ours."""
    quiet()
    family, config = _config(folder)
    model_of_config(family, config, UNSEEN, folder / "config.json")
    provenance = _provenance(folder)
    tokenizer = fast_tokenizer.read(folder / "tokenizer.json")
    return Source(family, config, _weights(folder), tokenizer, provenance)


def _config(folder: Path) -> tuple[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds a config.json")
    path = folder / "config.json"
    said = runs.read_json(path)
    known = {f"{family}ForCausalLM": family for family in FAMILIES}
    architecture = (said.get("architectures") or [None])[0]
    if architecture not in known:
        raise UserError(
            f"{path}: architectures: {architecture} is none that we can be; "
            f"there are {', '.join(known)}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # their validation raises many kinds
        raise UserError(f"{path}: not a config of transformers ({_first_line(error)})") from error
    if type(config).__name__ != f"{known[architecture]}Config":
        raise UserError(f"{path}: model_type {config.model_type} is not of {architecture}")
    return known[architecture], config


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the class, in fp32."""
    if not list(folder.glob("*.safetensors")):
        pickled = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"))]
        held = f"only {pickled[0]}, which is never unpickled" if pickled else "no weights"
        raise UserError(f"{folder}: holds {held}; give a folder with *.safetensors")
    try:
        model, found = load(folder)
    except Exception as error:  # safetensors, json and transformers raise many kinds
        raise UserError(f"{folder}: its weights cannot be read ({_first_line(error)})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(what):
            names = sorted(str(name) for name in found[what])
            raise UserError(
                f"{folder}: {what.replace('_', ' ')}, {len(names)} of them, first {names[0]}; "
                "its weights are not those of its config"
            )
    return dict(model.state_dict())


def _provenance(folder: Path) -> dict[str, Any] | None:
    """What an export of ours wrote of its run; None in a foreign folder."""
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    said = runs.read_json(path)
    if not isinstance(said.get("schema"), int) or said["schema"] > SCHEMA:
        raise UserError(f"{path}: schema {said.get('schema')}, this version reads {SCHEMA}")
    try:
        said["recipe"] = Recipe.model_validate_json(json.dumps(said["recipe"]))
        said["step"], said["manifest"] = int(said["step"]), dict(said["manifest"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not what an export writes ({_first_line(error)})") from error
    return said


def recipe_of(source: Source, rest: Recipe | None, where: Path) -> Recipe:
    """The recipe of a folder; raises UserError where its config says more than a recipe can.

    What is not of the model comes from `rest`, else from the run that was exported.
    """
    traits = traits_of(source.weights)
    model = model_of_config(source.family, source.config, traits, where / "config.json")
    if source.provenance is None:
        if rest is None:
            raise UserError(
                f"{where}: not exported by nano_moe, so it says nothing of text and training; "
                "name a recipe for these, such as --recipe recipes/base.yaml"
            )
        return rest.model_copy(update={"model": model})
    exported: Recipe = source.provenance["recipe"]
    difference = _first_difference(
        config_of(source.family, exported.model), config_of(source.family, model)
    )
    if difference is not None:
        raise UserError(
            f"{where / PROVENANCE}: its recipe gives another {difference} than config.json; "
            "delete it to go by config.json alone"
        )
    return exported if rest is None else rest.model_copy(update={"model": exported.model})


def model_of_config(family: str, theirs: Any, traits: Traits, path: Path) -> ModelConfig:
    """Our config of theirs; raises UserError naming the first of its fields that says more."""
    try:
        ours = _model(family, theirs, traits)
    except (ValidationError, FieldFault, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no recipe says this ({_fault(error)})") from error
    again = config_of(family, ours)
    field = _first_difference(theirs, again)
    if field is not None:
        said, done = (config.to_dict().get(field) for config in (theirs, again))
        raise UserError(
            f"{path}: {field}: {said!r} changes what is computed; our decoder does {done!r} alone"
        )
    (target,) = (t for t in TARGETS if t.name == family and t.is_of_kind(ours))
    for unmet in target.changes(ours):
        raise UserError(
            f"{path}: {family} computes this otherwise than a recipe would; it needs {unmet}"
        )
    return ours


def _model(family: str, theirs: Any, traits: Traits) -> ModelConfig:
    heads = {"mla": _latent(theirs)} if FAMILIES[family].latent else _heads(family, theirs)
    sparse = family not in ("Llama", "Qwen3") and _first_sparse(theirs) < theirs.num_hidden_layers
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        context=theirs.max_position_embeddings,
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        d_ff=theirs.intermediate_size,
        tie_embeddings=theirs.tie_word_embeddings,
        rope_theta=float(theirs.rope_parameters["rope_theta"]),
        norm_eps=float(theirs.rms_norm_eps),
        moe=_experts(family, theirs, traits) if sparse else None,
        **heads,
    )


def _heads(family: str, theirs: Any) -> dict[str, Any]:
    normed = family in ("Qwen3", "Qwen3Moe", "Qwen3Next", "Dots1")
    return {
        "n_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None),
        "qk_norm": normed or getattr(theirs, "use_qk_norm", False),
    }


def _latent(theirs: Any) -> MLAConfig:
    return MLAConfig(**{name: getattr(theirs, name) for name in MLAConfig.model_fields})


def _experts(family: str, theirs: Any, traits: Traits) -> MoEConfig:
    return MoEConfig.model_validate(_expert_fields(family, theirs, traits))


def _expert_fields(family: str, theirs: Any, traits: Traits) -> dict[str, Any]:
    kind = FAMILIES[family]
    n_experts, top_k = _one_of(theirs, *EXPERTS), theirs.num_experts_per_tok
    width = _one_of(theirs, "moe_intermediate_size", "intermediate_size")
    groups = getattr(theirs, "n_group", None) or 1
    n_shared = _n_shared(theirs, width) if traits.shared else 0
    return {
        "n_experts": n_experts,
        "top_k": top_k,
        "d_expert": width,
        "n_shared_experts": n_shared,
        "shared_expert_gate": family in GATED and traits.gated and n_shared > 0,
        "first_k_dense": _first_sparse(theirs),
        "every_n_layers": _one_of(theirs, "decoder_sparse_step", "moe_layer_interval", default=1),
        "score": "sigmoid" if kind.sigmoid else "softmax",
        "normalize_top_k": _normalizes(getattr(theirs, "norm_topk_prob", True), n_experts, top_k),
        "routed_scaling_factor": float(getattr(theirs, "routed_scaling_factor", 1.0)),
        "n_groups": groups,
        "top_k_groups": (getattr(theirs, "topk_group", None) or 1) if groups > 1 else 1,
        "group_score": kind.group_score if groups > 1 else "max",
        "bias_update_rate": 0.001 if traits.biased else 0.0,
        "bias_rule": "error" if traits.biased and not kind.sigmoid else "sign",
    }


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _one_of(theirs: Any, *names: str, default: Any = None) -> Any:
    values = (getattr(theirs, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def _first_sparse(theirs: Any) -> int:
    dense = getattr(theirs, "mlp_only_layers", None)
    if dense:
        return len(dense)  # the first ones, or the config made again differs
    return _one_of(theirs, "first_k_dense_replace", "moe_layer_start_index", default=0)


def _n_shared(theirs: Any, width: int) -> int:
    whole = getattr(theirs, "shared_expert_intermediate_size", None)
    if whole is not None:
        return whole // width
    return _one_of(theirs, "n_shared_experts", "moe_num_shared_experts", default=0)


def _normalizes(said: bool, n_experts: int, top_k: int) -> bool | str:
    return "even_top_1" if said and top_k == 1 and n_experts > 1 else bool(said)


def _spelt_out(config: Any) -> dict[str, Any]:
    """A config's fields, with what an omitted width of heads means."""
    said = config.to_dict()
    if not said.get("head_dim"):
        said["head_dim"] = config.hidden_size // config.num_attention_heads
    return said


def _first_difference(theirs: Any, ours: Any) -> str | None:
    """The first field in which two of their configs would compute otherwise."""
    one, other = _spelt_out(theirs), _spelt_out(ours)
    for field in sorted((one.keys() | other.keys()) - SILENT):
        if one.get(field) != other.get(field):
            return field
    return None


def import_run(
    source: Source, recipe: Recipe, folder: Path, *, name: str, corpus: Corpus | None
) -> Run:
    """A new run folder with the weights as best.ckpt; raises UserError.

    `corpus` is the text that the run of a foreign folder is to be evaluated on.
    """
    runs.check_name_is_free(name)
    check_fits(source.tokenizer, recipe.model.vocab_size)
    model = GPT(recipe.model)
    try:
        model.load_state_dict(state_of(source.family, recipe.model, source.weights))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: weights of another shape ({_first_line(error)})") from error
    manifest = _manifest(source, recipe, folder, corpus)
    runs.ROOT.mkdir(parents=True, exist_ok=True)
    target = Run(runs.ROOT / name)
    with creating_export(target.path) as path:
        path.mkdir()
        run = Run(path)
        write_text(run.recipe_file, recipe_file.dump(recipe))
        source.tokenizer.save(run.tokenizer_file)
        _save(run.best, _checkpoint(recipe, model, manifest["imported"]["step"]))
        runs.write_json(run.manifest_file, manifest)
    return target


def _save(path: Path, checkpoint: dict[str, Any]) -> None:
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # as torch reports a full disk
        raise OSError(errno.ENOSPC, "the disk may be full", str(path)) from error


def _checkpoint(recipe: Recipe, model: GPT, step: int) -> dict[str, Any]:
    """What `runs.load_model` reads: weights alone, nothing that training could go on from."""
    return {
        "nano_moe": {"schema": runs.SCHEMA, "recipe": recipe.model_dump()},
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "global_step": step,
    }


def _manifest(
    source: Source, recipe: Recipe, folder: Path, corpus: Corpus | None
) -> dict[str, Any]:
    """The exported run's manifest, or one that says what is known of a foreign folder."""
    said = source.provenance
    imported = {
        "path": str(folder),
        "architecture": f"{source.family}ForCausalLM",
        "run": said["run"] if said else None,
        "step": said["step"] if said else 0,
    }
    if said is not None and corpus is None:
        return said["manifest"] | {"imported": imported}
    assert corpus is not None
    if corpus.tokenizer.pieces != source.tokenizer.pieces:
        raise UserError(
            f"{folder}: its tokenizer has {source.tokenizer.n_vocab:,} ids and is not the one of "
            f"{corpus.path} ({corpus.tokenizer.kind}, {corpus.tokenizer.n_vocab:,}), so nothing "
            "could be evaluated; name a recipe whose data section makes the same tokens"
        )
    described = runs.describe(recipe, corpus=corpus, device="cpu")
    return described | {"imported": imported}


def _fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
