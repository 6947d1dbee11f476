"""Our tensors under Hugging Face's names and in their order of rows, and back.

Shapes: R rotated width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nano_moe.config import ModelConfig
from nano_moe.errors import UserError

Tensors = Mapping[str, Tensor]
RETRAIN = "export another run, or train this recipe anew"


class Rule(NamedTuple):
    """One of our tensors and the Hugging Face tensors that it is cut into, along its rows."""

    ours: str
    theirs: tuple[str, ...]
    order: Tensor | None = None  # their row i is our row order[i]


def cut(tensors: Tensors, rules: list[Rule]) -> dict[str, Tensor]:
    """Our tensors (weights, or gradients) under their names; raises KeyError if one has no rule."""
    by_name = {rule.ours: rule for rule in rules}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rule = by_name[name]
        rows = tensor if rule.order is None else tensor[rule.order]
        made |= dict(zip(rule.theirs, rows.chunk(len(rule.theirs)), strict=True))
    return made


def joined(tensors: Tensors, rules: list[Rule]) -> dict[str, Tensor]:
    """Their tensors (weights, or gradients) under our names; raises KeyError if one is left."""
    left, made = dict(tensors), {}
    for rule in rules:
        if rule.theirs[0] in left:
            rows = torch.cat([left.pop(name) for name in rule.theirs])
            made[rule.ours] = rows if rule.order is None else rows[rule.order.argsort()]
    if left:
        raise KeyError(", ".join(left))
    return made


def rules_of(family: str, config: ModelConfig) -> list[Rule]:
    """Every tensor that a model of this config may have."""
    rules = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("norm.weight", ("model.norm.weight",)),
        Rule("head.weight", ("lm_head.weight",)),
    ]
    layer = [
        Rule("attention_norm.weight", ("input_layernorm.weight",)),
        Rule("ffn_norm.weight", ("post_attention_layernorm.weight",)),
        *_inside("attention.", "self_attn.", _attention(family, config)),
        *_inside("ffn.", "mlp.", ffn_rules(family)),
    ]
    for number in range(config.n_layers):
        rules += _inside(f"blocks.{number}.", f"model.layers.{number}.", layer)
    return rules


def ffn_rules(family: str) -> list[Rule]:
    """A dense FFN or a sparse layer, without its place in the decoder."""
    shared = "shared_expert" if family in ("Qwen2Moe", "Qwen3Next") else "shared_experts"
    bias = "gate.moe_statics." if family == "Ernie4_5_Moe" else "gate."
    dense = [
        Rule("gate_up.weight", ("gate_proj.weight", "up_proj.weight")),
        Rule("down.weight", ("down_proj.weight",)),
    ]
    return [
        *dense,
        Rule("router.weight", ("gate.weight",)),
        Rule("router.expert_bias", (f"{bias}e_score_correction_bias",)),
        Rule("experts.gate_up", ("experts.gate_up_proj",)),
        Rule("experts.down", ("experts.down_proj",)),
        *_inside("shared.", f"{shared}.", dense),
        Rule("shared_gate.weight", ("shared_expert_gate.weight",)),
    ]


def _attention(family: str, config: ModelConfig) -> list[Rule]:
    same = ("v_proj", "o_proj", "q_norm", "k_norm", "q_a_proj", "kv_b_proj")
    queries = keys = None
    if config.mla is not None:
        turned = config.mla.qk_rope_head_dim
        queries = interleaved(config.mla.qk_nope_head_dim + turned, turned, config.n_heads)
        keys = interleaved(config.mla.kv_lora_rank + turned, turned)
    elif family == "Ernie4_5_Moe":
        queries = interleaved(config.head_size, config.head_size, config.n_heads)
        keys = interleaved(config.head_size, config.head_size, config.kv_heads)
    return [
        *(Rule(f"{name}.weight", (f"{name}.weight",)) for name in same),
        Rule("q_proj.weight", ("q_proj.weight",), queries),
        Rule("k_proj.weight", ("k_proj.weight",), keys),
        Rule("q_b_proj.weight", ("q_b_proj.weight",), queries),
        Rule("kv_a_proj.weight", ("kv_a_proj_with_mqa.weight",), keys),
        Rule("q_a_norm.weight", ("q_a_layernorm.weight",)),
        Rule("kv_a_norm.weight", ("kv_a_layernorm.weight",)),
    ]


def interleaved(width: int, turned: int, n_heads: int = 1) -> Tensor:
    """Row order that turns each head's last `turned` rows from halves (i, i + R/2) into pairs.

    (n_heads * width,)
    """
    rows = torch.arange(n_heads * width).view(n_heads, width)
    plain, rotated = rows.split([width - turned, turned], dim=1)
    pairs = rotated.unflatten(1, (2, -1)).mT.flatten(1)
    return torch.cat([plain, pairs], dim=1).flatten()


def _inside(ours: str, theirs: str, rules: list[Rule]) -> list[Rule]:
    return [Rule(ours + r.ours, tuple(theirs + name for name in r.theirs), r.order) for r in rules]


def check_finite(tensors: Tensors, where: Path, remedy: str) -> None:
    """Raises UserError where a weight is NaN or infinite; `where` is what they are of."""
    for name, tensor in tensors.items():
        spoilt = int((~tensor.isfinite()).sum())
        if spoilt:
            raise UserError(
                f"{where}: {name}: {spoilt:,} of {tensor.numel():,} numbers are not finite, so it "
                f"computes nothing; {remedy}"
            )


def without_training(
    config: ModelConfig, state: Tensors, *, scales: bool
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The recipe and tensors that evaluation needs: the same function of tokens, in fewer terms.

    The router's noise is dropped. A learned factor per expert goes into its down-projection, and,
    where the target does not scale weights (`scales`), so does the fixed one; both round once.
    """
    if config.moe is None:
        return config, dict(state)
    left = 1.0 if scales else config.moe.routed_scaling_factor
    kept = {}
    for name, tensor in state.items():
        if name.endswith("experts.down"):
            scale = state.get(name.replace("experts.down", "router.scale"))
            tensor = tensor if scale is None else tensor * scale[:, None, None]
            tensor = tensor if left == 1.0 else tensor * left
        if not name.endswith(("router.noise", "router.scale")):
            kept[name] = tensor
    factor = config.moe.routed_scaling_factor if scales else 1.0
    changes = {"noisy_top_k": False, "per_expert_scale": False, "init_from": None}
    moe = config.moe.model_copy(update=changes | {"routed_scaling_factor": factor})
    return config.model_copy(update={"moe": moe}), kept
