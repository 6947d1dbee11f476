"""What a format demands of a recipe, which format meets it, and the nearest recipe if none does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.errors import UserError


class Demand(NamedTuple):
    """A property of a recipe, the fields (dotted, under `model`) that give it, and why it is asked.

    The reason is said where the fields alone would not tell it.
    """

    met: Callable[[ModelConfig], bool]
    change: Callable[[ModelConfig], dict[str, Any]]
    reason: str | None = None


class Target(NamedTuple):
    """A class or architecture, and what it demands; latent attention and experts: with or not."""

    name: str
    latent: bool
    sparse: bool
    demands: Sequence[Demand]

    def is_of_kind(self, config: ModelConfig) -> bool:
        return self.latent == (config.mla is not None) and self.sparse == (config.moe is not None)

    def changes(self, config: ModelConfig) -> list[dict[str, Any]]:
        """Per unmet demand the fields to change, empty where this target holds the recipe."""
        return [
            {name: value for name, value in demand.change(config).items() if value != at[name]}
            for demand in self.demands
            if not demand.met(config)
            for at in [fields_of(config)]
        ]


def choose(targets: Sequence[Target], config: ModelConfig, what: str) -> Target:
    """The first target that computes what the recipe does; raises UserError with the nearest.

    `what` says in the fault what there is none of, such as "class of transformers".
    """
    config.check_causal()
    possible = [target for target in targets if target.is_of_kind(config)]
    if not possible:
        raise UserError(f"model.mla: no {what} is supported with latent attention; set it to null")
    nearest = min(possible, key=lambda target: len(target.changes(config)))
    changes = nearest.changes(config)
    if not changes:
        return nearest
    wanted = {name: value for change in changes for name, value in change.items()}
    fields = fields_of(config)
    has = ", ".join(f"model.{name}={_said(fields[name])}" for name in wanted)
    sets = " ".join(f"model.{name}={_said(value)}" for name, value in wanted.items())
    reasons = [f"; {d.reason}" for d in nearest.demands if d.reason and not d.met(config)]
    raise UserError(
        f"{has}: no {what} computes this together with the rest of the recipe; the nearest recipe "
        f"that one does ({nearest.name}) is trained with {sets}{''.join(reasons)}"
    )


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """A recipe's model, dotted field by field."""
    flat = dict(config)
    moe = flat.pop("moe")
    return flat | {f"moe.{name}": value for name, value in dict(moe or {}).items()}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _field(name: str, value: Any) -> Demand:
    return Demand(lambda c: fields_of(c)[name] == value, lambda c: {name: value})


def _moe(met: Callable[[MoEConfig], bool], **fields: Any) -> Demand:
    def holds(config: ModelConfig) -> bool:
        return config.moe is not None and met(config.moe)

    return Demand(holds, lambda c: {f"moe.{name}": value for name, value in fields.items()})


def _two_or_more(config: ModelConfig) -> dict[str, Any]:
    top_k = max(2, config.moe.top_k if config.moe is not None else 2)
    return {"moe.normalize_top_k": True, "moe.top_k": top_k}


NO_BIAS_FIELDS = {"bias_update_rate": 0.0, "bias_rule": "sign"}

SWIGLU = _field("activation", "swiglu")
PLAIN_HEADS, NORMED_HEADS = _field("qk_norm", False), _field("qk_norm", True)
HEADS_FILL_WIDTH = Demand(
    lambda c: c.mla is not None or c.n_heads * c.head_size == c.d_model,
    lambda c: {"head_dim": None},
)
HEADS_DIVIDE_WIDTH = Demand(
    lambda c: c.d_model % c.n_heads == 0,
    lambda c: {"d_model": -(-c.d_model // c.n_heads) * c.n_heads},
)
NOT_AS_DEEP_AS_LITE = Demand(
    lambda c: c.mla is None or c.mla.q_lora_rank is None or c.n_layers not in (26, 27),
    lambda c: {"n_layers": 25 if c.n_layers == 26 else 28},
    "llama.cpp takes 26 or 27 layers for DeepSeek-V2-Lite, which has no q_lora_rank",
)
EPSILON = _field("norm_eps", 1e-6)
TOKENS_CHOOSE = _field("moe.routing", "token_choice")
ONE_POSITION = _field("moe.router_window", 1)
SOFTMAX = _moe(lambda m: m.score == "softmax", score="softmax", **NO_BIAS_FIELDS)
SIGMOID = _field("moe.score", "sigmoid")
NORMALIZED = Demand(lambda c: c.moe is not None and c.moe.normalizes, _two_or_more)
NOT_NORMALIZED = _moe(lambda m: not m.normalizes, normalize_top_k=False)
NO_BIAS = _moe(lambda m: m.bias_update_rate == 0, **NO_BIAS_FIELDS)
UNGATED = _field("moe.shared_expert_gate", False)
GATED = Demand(
    lambda c: c.moe is not None and c.moe.shared_expert_gate,
    lambda c: {
        "moe.shared_expert_gate": True,
        "moe.n_shared_experts": max(1, c.moe.n_shared_experts if c.moe is not None else 0),
    },
)
NO_SHARED = _moe(lambda m: m.n_shared_experts == 0, n_shared_experts=0, shared_expert_gate=False)
EVERY_LAYER = _field("moe.every_n_layers", 1)
ALL_LAYERS_SPARSE = Demand(
    lambda c: all(c.is_sparse(layer) for layer in range(c.n_layers)),
    lambda c: {"moe.first_k_dense": 0, "moe.every_n_layers": 1},
)
NO_GROUPS = _moe(lambda m: m.n_groups == 1, n_groups=1, top_k_groups=1, group_score="max")
GROUPS_BY_BEST = _moe(lambda m: m.n_groups == 1 or m.group_score == "max", group_score="max")
GROUPS_BY_TWO = _moe(
    lambda m: m.n_groups == 1 or m.group_score == "top2_sum", group_score="top2_sum"
)
TWO_EXPERTS = _moe(lambda m: m.n_experts > 1, n_experts=2)
ANY_ROUTER = (SWIGLU, TOKENS_CHOOSE, ONE_POSITION)
UNGROUPED = (*ANY_ROUTER, SOFTMAX, NO_GROUPS)
UNBIASED = (*UNGROUPED, NO_BIAS)
