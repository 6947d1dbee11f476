"""Our tensors under Hugging Face's names and in their layout, and back.

Shapes: D d_model, V vocabulary, E experts, F hidden width, H heads, C head width, R its rotated
part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nano_moe.config import ModelConfig
from nano_moe.errors import UserError
from nano_moe.export.families import FAMILIES

Tensors = Mapping[str, Tensor]


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


def weights_of(family: str, config: ModelConfig, state: Tensors) -> dict[str, Tensor]:
    """Every tensor of their class that computes what our `state` does.

    What their layer has and ours has not is added so that it changes nothing: selection biases of
    0; gates of 0, which halve, before a projection that is doubled; a shared expert of zeros.
    """
    made = cut(state, rules_of(family, config))
    for layer in range(config.n_layers):
        if config.is_sparse(layer):
            assert config.moe is not None
            mlp = f"model.layers.{layer}.mlp."
            if family in BIASES:
                _add_bias(made, mlp, BIASES[family])
            if family in GATED:
                _add_shared_gate(made, mlp)
            if FAMILIES[family].scales and config.moe.n_shared_experts == 0:
                made |= silent(f"{mlp}shared_experts.", width=0, like=made[f"{mlp}gate.weight"])
        if family == "Qwen3Next":
            _add_attention_gate(made, f"model.layers.{layer}.self_attn.", config.n_heads)
    return _norms_plus(-1, made) if family == "Qwen3Next" else made


def state_of(family: str, config: ModelConfig, weights: Tensors) -> dict[str, Tensor]:
    """Our tensors of their class's, what `weights_of` adds taken off; raises UserError.

    `config` says what was added, as `traits_of` finds it.
    """
    made = dict(weights)
    if family == "Qwen3Next":
        made = _norms_plus(1, made)
    for layer in range(config.n_layers):
        if family == "Qwen3Next":
            _take_attention_gate(made, f"model.layers.{layer}.self_attn.", config.n_heads)
        if config.is_sparse(layer):
            assert config.moe is not None
            mlp = f"model.layers.{layer}.mlp."
            if family in BIASES:
                _take_bias(made, f"{mlp}{BIASES[family]}", keep=config.moe.bias_update_rate > 0)
            if family in GATED and not config.moe.shared_expert_gate:
                _take_shared_gate(made, mlp)
            if config.moe.n_shared_experts == 0:
                _take_shared(made, f"{mlp}shared_expert")
    return joined(made, rules_of(family, config))


class Traits(NamedTuple):
    """What their weights say of the recipe, and their config does not."""

    biased: bool
    gated: bool
    shared: bool


def traits_of(weights: Tensors) -> Traits:
    """Which of what a class may hold is more than zeros."""

    def any_in(*parts: str) -> bool:
        found = [t for name, t in weights.items() if any(part in name for part in parts)]
        return any(bool(t.any()) for t in found)

    return Traits(
        biased=any_in("e_score_correction_bias"),
        gated=any_in("shared_expert_gate"),
        shared=any_in("shared_expert.down_proj", "shared_experts.down_proj"),
    )


# The selection bias's name within a sparse layer, in the classes that have one; and the classes
# that weigh the shared expert by a gate.
BIASES = {
    "Ernie4_5_Moe": "gate.moe_statics.e_score_correction_bias",
    "Glm4Moe": "gate.e_score_correction_bias",
    "Dots1": "gate.e_score_correction_bias",
    "DeepseekV3": "gate.e_score_correction_bias",
}
GATED = ("Qwen2Moe", "Qwen3Next")


def _add_bias(made: dict[str, Tensor], mlp: str, name: str) -> None:
    bias = made.get(f"{mlp}{name}")
    if bias is None:
        bias = torch.zeros(len(made[f"{mlp}gate.weight"]))  # (E,)
    made[f"{mlp}{name}"] = bias.unsqueeze(0) if "statics" in name else bias


def _add_shared_gate(made: dict[str, Tensor], mlp: str) -> None:
    gate, down = f"{mlp}shared_expert_gate.weight", f"{mlp}shared_expert.down_proj.weight"
    if gate in made:
        return
    like = made[f"{mlp}gate.weight"]  # (E, D)
    made[gate] = like.new_zeros(1, like.shape[1])
    if down in made:
        made[down] = made[down] * 2
        return
    made |= silent(f"{mlp}shared_expert.", width=1, like=like)


def silent(prefix: str, *, width: int, like: Tensor) -> dict[str, Tensor]:
    """A shared expert of zeros, for a router like (E, D)."""
    columns = like.new_zeros(like.shape[1], width)
    rows = {f"{prefix}{name}_proj.weight": columns.T for name in ("gate", "up")}
    return rows | {f"{prefix}down_proj.weight": columns}


def _take_bias(made: dict[str, Tensor], name: str, *, keep: bool) -> None:
    if keep:
        made[name] = made[name].flatten()
    else:
        _take_zeros(made, name)


def _take_zeros(made: dict[str, Tensor], name: str) -> None:
    """Drop what must not say anything; raises UserError where it does."""
    if made.pop(name).any():
        raise UserError(f"{name} is not zero, as the recipe that it came with demands")


def _take_shared_gate(made: dict[str, Tensor], mlp: str) -> None:
    _take_zeros(made, f"{mlp}shared_expert_gate.weight")
    down = f"{mlp}shared_expert.down_proj.weight"
    made[down] = made[down] / 2


def _take_shared(made: dict[str, Tensor], prefix: str) -> None:
    for name in [name for name in made if name.startswith(prefix)]:
        if name.endswith("down_proj.weight"):  # of zeros, it silences the other two
            _take_zeros(made, name)
        else:
            made.pop(name)


def _add_attention_gate(made: dict[str, Tensor], attention: str, n_heads: int) -> None:
    """Behind each head's rows of the query projection as many of zeros: (H*C, D) to (H*2C, D)."""
    heads = made[f"{attention}q_proj.weight"].unflatten(0, (n_heads, -1))
    made[f"{attention}q_proj.weight"] = torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1)
    made[f"{attention}o_proj.weight"] = made[f"{attention}o_proj.weight"] * 2


def _take_attention_gate(made: dict[str, Tensor], attention: str, n_heads: int) -> None:
    heads = made[f"{attention}q_proj.weight"].unflatten(0, (n_heads, -1))
    queries, gate = heads.chunk(2, dim=1)
    if gate.any():
        raise UserError(f"{attention}q_proj gates attention's output, which our decoder does not")
    made[f"{attention}q_proj.weight"] = queries.flatten(0, 1)
    made[f"{attention}o_proj.weight"] = made[f"{attention}o_proj.weight"] / 2


def _norms_plus(shift: int, tensors: Tensors) -> dict[str, Tensor]:
    """Qwen3-Next's norms multiply by 1 + weight."""
    return {n: t + shift if n.endswith("norm.weight") else t for n, t in tensors.items()}
