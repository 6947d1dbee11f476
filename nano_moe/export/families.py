"""Hugging Face's classes of decoders: which recipe each holds, and its config, both ways.

What they call a family is a set of choices that a recipe makes, so a `ModelConfig` says all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers

from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.export import demands
from nano_moe.export.demands import ANY_ROUTER, SWIGLU, Demand, Target, choose

Fields = dict[str, Any]


class Family(NamedTuple):
    """A class: what its config says beyond the decoder's sizes, and what it demands of a recipe.

    `dense` is demanded of recipes without experts, `sparse` of those with; None: holds none such.
    """

    parts: tuple[Callable[[ModelConfig], Fields], ...]
    dense: tuple[Demand, ...] | None = None
    sparse: tuple[Demand, ...] | None = None
    latent: bool = False
    scales: bool = False  # multiplies weights by routed_scaling_factor
    sigmoid: bool = False
    group_score: str = "max"


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None
    return config.moe


def _rope(config: ModelConfig) -> Fields:
    return {"rope_type": "default", "rope_theta": config.rope_theta}


def _heads(config: ModelConfig) -> Fields:
    return {"head_dim": config.head_size}


def _all_full(config: ModelConfig) -> Fields:
    return {"layer_types": ["full_attention"] * config.n_layers}


def _no_window(config: ModelConfig) -> Fields:
    return {"sliding_window": None}


def _chosen(config: ModelConfig) -> Fields:
    moe = _moe(config)
    return {"num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.normalizes}


def _mixtral(config: ModelConfig) -> Fields:
    moe = _moe(config)
    return {
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": config.expert_width,
    }


def _qwen(config: ModelConfig) -> Fields:
    moe = _moe(config)
    return {
        "num_experts": moe.n_experts,
        "moe_intermediate_size": config.expert_width,
        "mlp_only_layers": list(range(moe.first_k_dense)),
        "decoder_sparse_step": moe.every_n_layers,
    }


def _gated_shared(config: ModelConfig) -> Fields:
    """A recipe without shared experts gets one of width 1 that says nothing."""
    width = _moe(config).n_shared_experts * config.expert_width
    return {"shared_expert_intermediate_size": width or 1}


def _no_biases(config: ModelConfig) -> Fields:
    return {"qkv_bias": False}


def _ernie(config: ModelConfig) -> Fields:
    moe = _moe(config)
    return {
        "moe_num_experts": moe.n_experts,
        "moe_k": moe.top_k,
        "moe_num_shared_experts": moe.n_shared_experts,
        "moe_intermediate_size": config.expert_width,
        "moe_layer_start_index": moe.first_k_dense,
        "moe_layer_end_index": config.n_layers - 1,
        "moe_layer_interval": moe.every_n_layers,
    }


def _deepseek(config: ModelConfig) -> Fields:
    """DeepSeek's sparse layer, which GLM and dots took over."""
    if config.moe is None:
        return {"first_k_dense_replace": config.n_layers}
    moe = config.moe
    return {
        "n_routed_experts": moe.n_experts,
        "n_shared_experts": moe.n_shared_experts,
        "moe_intermediate_size": config.expert_width,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "first_k_dense_replace": moe.first_k_dense,
        "n_group": moe.n_groups,
        "topk_group": moe.top_k_groups,
        **_chosen(config),
    }


def _glm(config: ModelConfig) -> Fields:
    return {"use_qk_norm": config.qk_norm}


def _whole_rotation(config: ModelConfig) -> Fields:
    """These two classes rotate a half or a quarter of each head unless told otherwise."""
    return {"rope_parameters": _rope(config) | {"partial_rotary_factor": 1.0}}


def _latent(config: ModelConfig) -> Fields:
    assert config.mla is not None
    return config.mla.model_dump()


def _greedy(config: ModelConfig) -> Fields:
    groups = config.moe is not None and config.moe.n_groups > 1
    return {"topk_method": "group_limited_greedy" if groups else "greedy"}


def _no_extra_head(config: ModelConfig) -> Fields:
    return {"num_mtp_layers": 0}


_DEEPSEEK = (*ANY_ROUTER, demands.UNGATED, demands.EVERY_LAYER)
_SIGMOID = (*_DEEPSEEK, demands.SIGMOID, demands.GROUPS_BY_TWO, demands.TWO_EXPERTS)
_GREEDY = (
    *_DEEPSEEK,
    demands.SOFTMAX,
    demands.NO_BIAS,
    demands.NOT_NORMALIZED,
    demands.GROUPS_BY_BEST,
)

# In order of preference: plain classes before those that hold a recipe with weights of zero.
FAMILIES = {
    "Llama": Family((_heads,), dense=(SWIGLU, demands.PLAIN_HEADS)),
    "Qwen3": Family((_heads,), dense=(SWIGLU, demands.NORMED_HEADS)),
    "Mixtral": Family(
        (_heads, _mixtral),
        sparse=(
            *demands.UNBIASED,
            demands.PLAIN_HEADS,
            demands.NO_SHARED,
            demands.NORMALIZED,
            demands.ALL_LAYERS_SPARSE,
        ),
    ),
    "Qwen3Moe": Family(
        (_heads, _chosen, _qwen),
        sparse=(*demands.UNBIASED, demands.NORMED_HEADS, demands.NO_SHARED),
    ),
    "Ernie4_5_Moe": Family(
        (_ernie,),
        sparse=(
            *demands.UNGROUPED,
            demands.PLAIN_HEADS,
            demands.HEADS_FILL_WIDTH,
            demands.UNGATED,
            demands.NORMALIZED,
        ),
    ),
    "Qwen2Moe": Family(
        (_chosen, _qwen, _gated_shared, _no_biases),
        sparse=(*demands.UNBIASED, demands.PLAIN_HEADS, demands.HEADS_FILL_WIDTH),
    ),
    "Qwen3Next": Family(
        (_heads, _chosen, _qwen, _gated_shared, _whole_rotation, _all_full),
        sparse=(*demands.UNBIASED, demands.NORMED_HEADS),
    ),
    "Glm4Moe": Family(
        (_heads, _deepseek, _glm, _whole_rotation, _no_extra_head),
        sparse=_SIGMOID,
        scales=True,
        sigmoid=True,
        group_score="top2_sum",
    ),
    "Dots1": Family(
        (_heads, _deepseek, _all_full, _no_window),
        sparse=(*_SIGMOID, demands.NORMED_HEADS),
        scales=True,
        sigmoid=True,
        group_score="top2_sum",
    ),
    "DeepseekV3": Family(
        (_deepseek, _latent, _no_extra_head),
        dense=(SWIGLU, demands.EPSILON),
        sparse=(*_SIGMOID, demands.EPSILON),
        latent=True,
        scales=True,
        sigmoid=True,
        group_score="top2_sum",
    ),
    "DeepseekV2": Family(
        (_deepseek, _latent, _greedy),
        sparse=(*_GREEDY, demands.EPSILON, demands.HEADS_DIVIDE_WIDTH),
        latent=True,
        scales=True,
    ),
}
TARGETS = [
    Target(name, family.latent, sparse, needed)
    for name, family in FAMILIES.items()
    for sparse, needed in ((False, family.dense), (True, family.sparse))
    if needed is not None
]


def family_of(config: ModelConfig) -> str:
    """The class that computes what a recipe does; raises UserError with the nearest recipe."""
    return choose(TARGETS, config, "Hugging Face class").name


def config_of(family: str, config: ModelConfig, **fields: Any) -> Any:
    """Hugging Face's config of our decoder as one of their families; `fields` are added to it."""
    fields = _decoder(config) | fields
    for part in FAMILIES[family].parts:
        fields |= part(config)
    return getattr(transformers, f"{family}Config")(**fields)


def model_of(family: str, config: ModelConfig, **fields: Any) -> Any:
    """Their decoder in evaluation mode, its weights as their class draws them."""
    made = getattr(transformers, f"{family}ForCausalLM")(config_of(family, config, **fields))
    return made.eval()


def _decoder(config: ModelConfig) -> Fields:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope(config),
        "tie_word_embeddings": config.tie_embeddings,
    }
