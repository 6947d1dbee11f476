"""Hugging Face configs as recipes' models: the same fields, or a refusal that names one.

A config is taken for understood when the recipe made of it gives the same config again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nano_moe.config import FieldFault, MLAConfig, ModelConfig, MoEConfig
from nano_moe.errors import UserError
from nano_moe.export.families import FAMILIES, TARGETS, config_of
from nano_moe.export.weights import GATED, Traits

UNSEEN = Traits(biased=False, gated=True, shared=True)  # before weights are read
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
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
    "num_nextn_predict_layers",  # layers after the last, which the classes leave out
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
    # of the linear attention that Qwen3-Next has where `layer_types` says so
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
}


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


def _latent(theirs: Any) -> MLAConfig:
    return MLAConfig(**{name: getattr(theirs, name) for name in MLAConfig.model_fields})


def _heads(family: str, theirs: Any) -> dict[str, Any]:
    normed = family in ("Qwen3", "Qwen3Moe", "Qwen3Next", "Dots1")
    return {
        "n_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None),
        "qk_norm": normed or getattr(theirs, "use_qk_norm", False),
    }


def expert_fields(family: str, theirs: Any, traits: Traits) -> dict[str, Any]:
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
        moe=MoEConfig.model_validate(expert_fields(family, theirs, traits)) if sparse else None,
        **heads,
    )


def _spelt_out(config: Any) -> dict[str, Any]:
    """A config's fields, with what an omitted width of heads means."""
    said = config.to_dict()
    if not said.get("head_dim"):
        said["head_dim"] = config.hidden_size // config.num_attention_heads
    return said


def first_difference(theirs: Any, ours: Any) -> str | None:
    """The first field in which two of their configs would compute otherwise."""
    one, other = _spelt_out(theirs), _spelt_out(ours)
    for field in sorted((one.keys() | other.keys()) - SILENT):
        if one.get(field) != other.get(field):
            return field
    return None


def model_of_config(family: str, theirs: Any, traits: Traits, path: Path) -> ModelConfig:
    """Our config of theirs; raises UserError naming the first of its fields that says more."""
    try:
        ours = _model(family, theirs, traits)
    except (ValidationError, FieldFault, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no recipe says this ({fault_of(error)})") from error
    if ours.moe is None and family not in ("Llama", "Qwen3"):
        raise UserError(f"{path}: {family}: no layer has experts; a dense class computes the same")
    again = config_of(family, ours)
    field = first_difference(theirs, again)
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


def fault_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
