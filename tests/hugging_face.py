"""Our decoder in Hugging Face's terms: each family's config, and tensors by name, both ways.

What they call a family is a set of choices that a recipe makes, so a `ModelConfig` says all.
Shapes: D d_model, F hidden width, R rotated width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from nano_moe.config import MLAConfig, ModelConfig, MoEConfig

Tensors = Mapping[str, Tensor]


class Rule(NamedTuple):
    """One of our tensors and the Hugging Face tensors that it is cut into, along its rows."""

    ours: str
    theirs: tuple[str, ...]
    order: Tensor | None = None  # their row i is our row order[i]


def to_hugging_face(tensors: Tensors, rules: list[Rule]) -> dict[str, Tensor]:
    """Our tensors (weights, or gradients) under their names; raises KeyError if one has no rule."""
    by_name, made = {rule.ours: rule for rule in rules}, {}
    for name, tensor in tensors.items():
        rule = by_name[name]
        rows = tensor if rule.order is None else tensor[rule.order]
        made |= dict(zip(rule.theirs, rows.chunk(len(rule.theirs)), strict=True))
    return made


def from_hugging_face(tensors: Tensors, rules: list[Rule]) -> dict[str, Tensor]:
    """Their tensors (weights, or gradients) under our names; raises KeyError if one is left."""
    left, made = dict(tensors), {}
    for rule in rules:
        if rule.theirs[0] in left:
            rows = torch.cat([left.pop(name) for name in rule.theirs])
            made[rule.ours] = rows if rule.order is None else rows[rule.order.argsort()]
    if left:
        raise KeyError(", ".join(left))
    return made


def rules_of(config: ModelConfig) -> list[Rule]:
    """Every tensor that a model of this config may have."""
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("norm.weight", ("model.norm.weight",)),
        Rule("head.weight", ("lm_head.weight",)),
    ]
    layer = [
        Rule("attention_norm.weight", ("input_layernorm.weight",)),
        Rule("ffn_norm.weight", ("post_attention_layernorm.weight",)),
        *_inside("attention.", "self_attn.", _attention(config)),
        *_inside("ffn.", "mlp.", ffn_rules(config.moe)),
    ]
    for number in range(config.n_layers):
        rules += _inside(f"blocks.{number}.", f"model.layers.{number}.", layer)
    return rules


def ffn_rules(moe: MoEConfig | None) -> list[Rule]:
    """A dense FFN or a sparse layer, without its place in the decoder."""
    shared = "shared_expert" if moe is not None and moe.shared_expert_gate else "shared_experts"
    dense = [
        Rule("gate_up.weight", ("gate_proj.weight", "up_proj.weight")),
        Rule("down.weight", ("down_proj.weight",)),
    ]
    return [
        *dense,
        Rule("router.weight", ("gate.weight",)),
        Rule("router.expert_bias", ("gate.e_score_correction_bias",)),
        Rule("experts.gate_up", ("experts.gate_up_proj",)),
        Rule("experts.down", ("experts.down_proj",)),
        *_inside("shared.", f"{shared}.", dense),
        Rule("shared_gate.weight", ("shared_expert_gate.weight",)),
    ]


def _attention(config: ModelConfig) -> list[Rule]:
    same = ("v_proj", "o_proj", "q_norm", "k_norm", "q_a_proj", "kv_b_proj")
    rules = [Rule(f"{name}.weight", (f"{name}.weight",)) for name in same]
    queries = keys = None
    if config.mla is not None:
        queries = _last_interleaved(_query_width(config.mla), config.mla, config.n_heads)
        keys = _last_interleaved(config.mla.kv_lora_rank + config.mla.qk_rope_head_dim, config.mla)
    return rules + [
        Rule("q_proj.weight", ("q_proj.weight",), queries),
        Rule("k_proj.weight", ("k_proj.weight",)),
        Rule("q_b_proj.weight", ("q_b_proj.weight",), queries),
        Rule("kv_a_proj.weight", ("kv_a_proj_with_mqa.weight",), keys),
        Rule("q_a_norm.weight", ("q_a_layernorm.weight",)),
        Rule("kv_a_norm.weight", ("kv_a_layernorm.weight",)),
    ]


def _query_width(mla: MLAConfig) -> int:
    return mla.qk_nope_head_dim + mla.qk_rope_head_dim


def _last_interleaved(width: int, mla: MLAConfig, n_heads: int = 1) -> Tensor:
    """Row order that turns each head's last R rows from halves (i, i + R/2) into pairs (2i, 2i+1).

    (n_heads * width,)
    """
    rows = torch.arange(n_heads * width).view(n_heads, width)
    plain, turned = rows.split([width - mla.qk_rope_head_dim, mla.qk_rope_head_dim], dim=1)
    pairs = turned.unflatten(1, (2, -1)).mT.flatten(1)
    return torch.cat([plain, pairs], dim=1).flatten()


def _inside(ours: str, theirs: str, rules: list[Rule]) -> list[Rule]:
    return [Rule(ours + r.ours, tuple(theirs + name for name in r.theirs), r.order) for r in rules]


def config_of(family: str, config: ModelConfig) -> Any:
    """Hugging Face's config of our decoder as one of their families."""
    fields = _decoder(config)
    for part in FAMILIES[family]:
        fields |= part(config)
    return getattr(transformers, f"{family}Config")(**fields)


def model_of(family: str, config: ModelConfig) -> Any:
    """Their decoder in evaluation mode, its weights as their class draws them."""
    return getattr(transformers, f"{family}ForCausalLM")(config_of(family, config)).eval()


def _decoder(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def _heads(config: ModelConfig) -> dict[str, Any]:
    return {"head_dim": config.head_size}


def _chosen(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {"num_experts_per_tok": config.moe.top_k, "norm_topk_prob": config.moe.normalizes}


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None and config.moe.normalizes
    return {
        "num_local_experts": config.moe.n_experts,
        "num_experts_per_tok": config.moe.top_k,
        "intermediate_size": config.expert_width,
    }


def _olmoe(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {"num_experts": config.moe.n_experts, "intermediate_size": config.expert_width}


def _qwen(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "num_experts": config.moe.n_experts,
        "moe_intermediate_size": config.expert_width,
        "mlp_only_layers": list(range(config.moe.first_k_dense)),
        "decoder_sparse_step": config.moe.every_n_layers,
    }


def _gated_shared(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None and config.moe.shared_expert_gate
    width = config.moe.n_shared_experts * config.expert_width
    return {"shared_expert_intermediate_size": width, "qkv_bias": False}


def _deepseek(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek's layer, which GLM took over."""
    assert config.moe is not None and config.moe.every_n_layers == 1
    return {
        "n_routed_experts": config.moe.n_experts,
        "n_shared_experts": config.moe.n_shared_experts,
        "moe_intermediate_size": config.expert_width,
        "routed_scaling_factor": config.moe.routed_scaling_factor,
        "first_k_dense_replace": config.moe.first_k_dense,
        "n_group": config.moe.n_groups,
        "topk_group": config.moe.top_k_groups,
    }


def _glm(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    return {"use_qk_norm": config.qk_norm, "rope_parameters": rope, "num_mtp_layers": 0}


def _latent(config: ModelConfig) -> dict[str, Any]:
    """Their latents' norms have an epsilon of 1e-6, whatever the config says."""
    assert config.mla is not None and config.norm_eps == 1e-6
    return config.mla.model_dump()


def _group_limited(config: ModelConfig) -> dict[str, Any]:
    """Their DeepSeek-V2 reads `norm_topk_prob`, and never normalizes."""
    assert config.moe is not None and not config.moe.normalizes
    return {"topk_method": "group_limited_greedy" if config.moe.n_groups > 1 else "greedy"}


def _no_extra_head(_: ModelConfig) -> dict[str, Any]:
    return {"num_mtp_layers": 0}


# What a family's config says beyond the decoder's sizes.
FAMILIES: dict[str, tuple[Callable[[ModelConfig], dict[str, Any]], ...]] = {
    "Llama": (_heads,),
    "Qwen3": (_heads,),
    "Mixtral": (_heads, _mixtral),
    "Olmoe": (_chosen, _olmoe),
    "Qwen2Moe": (_chosen, _qwen, _gated_shared),
    "Qwen3Moe": (_heads, _chosen, _qwen),
    "Glm4Moe": (_heads, _chosen, _deepseek, _glm),
    "DeepseekV2": (_chosen, _deepseek, _latent, _group_limited),
    "DeepseekV3": (_chosen, _deepseek, _latent, _no_extra_head),
}
