"""Parameters, FLOPs and bytes of a recipe, from its fields alone: no model is built.

Conventions: FLOPs are 2 per multiply-add of every matrix product, attention over the full T x T
square, training = 3 x forward (one forward, two products backward per forward product). A token's
active parameters are all it is multiplied with or looked up in: embeddings, head and routers
included, and of the routed experts top_k per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from nano_moe.config import ModelConfig, MoEConfig, Recipe

FLOAT32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2}


class WeightGroup(NamedTuple):
    """Weights of one shape and role, over the whole model."""

    kind: str  # embedding, attention, norm, ffn, router, experts, shared_experts, head
    name: str
    shape: tuple[int, ...]
    copies: int  # stored
    active: int  # of those, touched by one token
    products: int  # matrix products with it per token

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Count(NamedTuple):
    """What a recipe costs; the field names are the keys of `count --json`."""

    total_params: int
    active_params: int
    embedding_params: int
    router_params: int
    forward_flops_per_token: int
    train_flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kv_cache_bytes_per_token: int
    params_by_kind: dict[str, int]


def weight_groups(model: ModelConfig) -> Iterator[WeightGroup]:
    """Every weight of the decoder, grouped; sums to the built model's parameters."""
    width, head = model.d_model, model.head_size
    layers = model.n_layers
    yield WeightGroup("embedding", "embedding", (model.vocab_size, width), 1, 1, 0)
    for name, heads in (("q_proj", model.n_heads), ("k_proj", model.kv_heads)):
        yield WeightGroup("attention", name, (heads * head, width), layers, layers, layers)
    yield WeightGroup("attention", "v_proj", (model.kv_heads * head, width), *[layers] * 3)
    yield WeightGroup("attention", "o_proj", (width, model.n_heads * head), *[layers] * 3)
    yield WeightGroup("norm", "norms", (width,), 2 * layers + 1, 2 * layers + 1, 0)
    if model.qk_norm:
        yield WeightGroup("norm", "qk_norms", (head,), 2 * layers, 2 * layers, 0)
    sparse = sum(model.is_sparse(layer) for layer in range(layers))
    if sparse < layers:
        yield from _swiglu("ffn", width, model.d_ff, layers - sparse, layers - sparse)
    if model.moe is not None:
        yield from _moe_groups(model, model.moe, sparse)
    stored = 0 if model.tie_embeddings else 1
    yield WeightGroup("head", "head", (model.vocab_size, width), stored, stored, 1)


def count(recipe: Recipe) -> Count:
    """Total every figure of a recipe.

    Weights, gradients and optimizer state are float32 (bf16 is autocast over float32 weights);
    the KV cache is in the recipe's precision, with `auto` counted as fp32.
    """
    model = recipe.model
    groups = list(weight_groups(model))
    total = sum(g.size * g.copies for g in groups)
    kinds: dict[str, int] = {}
    for g in groups:
        kinds[g.kind] = kinds.get(g.kind, 0) + g.size * g.copies
    forward = 2 * sum(g.size * g.products for g in groups) + attention_flops(model)
    cached = 2 * model.n_layers * model.kv_heads * model.head_size  # keys and values
    return Count(
        total_params=total,
        active_params=sum(g.size * g.active for g in groups),
        embedding_params=kinds["embedding"] + kinds["head"],
        router_params=kinds.get("router", 0),
        forward_flops_per_token=forward,
        train_flops_per_token=3 * forward,
        weight_bytes=FLOAT32_BYTES * total,
        gradient_bytes=FLOAT32_BYTES * total,
        optimizer_bytes=_optimizer_bytes(recipe, groups),
        kv_cache_bytes_per_token=cached * BYTES.get(recipe.trainer.precision, FLOAT32_BYTES),
        params_by_kind={kind: n for kind, n in kinds.items() if n},
    )


def attention_flops(model: ModelConfig) -> int:
    """Forward FLOPs per token of scores and weighted values over the full context."""
    return model.n_layers * 2 * 2 * model.context * model.n_heads * model.head_size


def _swiglu(kind: str, width: int, hidden: int, copies: int, active: int) -> Iterator[WeightGroup]:
    yield WeightGroup(kind, "gate_up", (2 * hidden, width), copies, active, active)
    yield WeightGroup(kind, "down", (width, hidden), copies, active, active)


def _moe_groups(model: ModelConfig, moe: MoEConfig, sparse: int) -> Iterator[WeightGroup]:
    hidden, width = model.expert_width, model.d_model
    yield WeightGroup("router", "router", (moe.n_experts, width), sparse, sparse, sparse)
    yield from _swiglu("experts", width, hidden, sparse * moe.n_experts, sparse * moe.top_k)
    if moe.n_shared_experts:
        shared = sparse * moe.n_shared_experts
        yield from _swiglu("shared_experts", width, hidden, shared, shared)


def _optimizer_bytes(recipe: Recipe, groups: list[WeightGroup]) -> int:
    """Muon keeps one momentum per hidden weight, AdamW two moments per weight."""
    hidden = {"attention", "ffn", "experts", "shared_experts"}
    moments = sum(
        g.size * g.copies * (1 if recipe.optim.name == "muon" and g.kind in hidden else 2)
        for g in groups
    )
    return FLOAT32_BYTES * moments
