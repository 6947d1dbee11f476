"""All that a Hugging Face class holds, from our tensors, and our tensors from all that it holds.

Some classes have more than a recipe asks for. It is added so that it changes nothing, and looked at
before it is taken off again.

Shapes: D d_model, E experts, H heads, C head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nano_moe.config import ModelConfig
from nano_moe.errors import UserError
from nano_moe.export.families import FAMILIES
from nano_moe.export.tensors import Tensors, cut, joined, rules_of

# The selection bias's name within a sparse layer, in the classes that have one; and the classes
# that weigh the shared expert by a gate.
BIASES = {
    "Ernie4_5_Moe": "gate.moe_statics.e_score_correction_bias",
    "Glm4Moe": "gate.e_score_correction_bias",
    "Dots1": "gate.e_score_correction_bias",
    "DeepseekV3": "gate.e_score_correction_bias",
}
GATED = ("Qwen2Moe", "Qwen3Next")


def _silent(prefix: str, *, width: int, like: Tensor) -> dict[str, Tensor]:
    """A shared expert of zeros, for a router like (E, D)."""
    columns = like.new_zeros(like.shape[1], width)
    rows = {f"{prefix}{name}_proj.weight": columns.T for name in ("gate", "up")}
    return rows | {f"{prefix}down_proj.weight": columns}


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
    made |= _silent(f"{mlp}shared_expert.", width=1, like=like)


def _add_attention_gate(made: dict[str, Tensor], attention: str, n_heads: int) -> None:
    """Behind each head's rows of the query projection as many of zeros: (H*C, D) to (H*2C, D)."""
    heads = made[f"{attention}q_proj.weight"].unflatten(0, (n_heads, -1))
    made[f"{attention}q_proj.weight"] = torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1)
    made[f"{attention}o_proj.weight"] = made[f"{attention}o_proj.weight"] * 2


def _norms_plus(shift: int, tensors: Tensors) -> dict[str, Tensor]:
    """Qwen3-Next's norms multiply by 1 + weight."""
    return {n: t + shift if n.endswith("norm.weight") else t for n, t in tensors.items()}


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
                made |= _silent(f"{mlp}shared_experts.", width=0, like=made[f"{mlp}gate.weight"])
        if family == "Qwen3Next":
            _add_attention_gate(made, f"model.layers.{layer}.self_attn.", config.n_heads)
    return _norms_plus(-1, made) if family == "Qwen3Next" else made


def _take_zeros(made: dict[str, Tensor], name: str) -> None:
    """Drop what must not say anything; raises UserError where it does."""
    if made.pop(name).any():
        raise UserError(f"{name} is not zero, as the recipe that it came with demands")


def _take_bias(made: dict[str, Tensor], name: str, *, keep: bool) -> None:
    if keep:
        made[name] = made[name].flatten()
    else:
        _take_zeros(made, name)


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


def _take_attention_gate(made: dict[str, Tensor], attention: str, n_heads: int) -> None:
    heads = made[f"{attention}q_proj.weight"].unflatten(0, (n_heads, -1))
    queries, gate = heads.chunk(2, dim=1)
    if gate.any():
        raise UserError(f"{attention}q_proj gates attention's output, which our decoder does not")
    made[f"{attention}q_proj.weight"] = queries.flatten(0, 1)
    made[f"{attention}o_proj.weight"] = made[f"{attention}o_proj.weight"] / 2


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
