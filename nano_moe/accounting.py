"""Parameters, FLOPs and bytes of a recipe, from its fields alone: no model is built.

Conventions: FLOPs are 2 per multiply-add of every matrix product, attention over the full T x T
square, training = 3 x forward (one forward, two products backward per forward product; one, where a
router is frozen). Forward is the training one: with the product that spreads the noise of
noisy_top_k, which evaluation leaves out, and as if no capacity dropped a token. A token's active
parameters are all it is multiplied with or looked up in: embeddings, head and routers included, and
of the routed experts top_k per layer (on average, where the experts choose).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nano_moe.config import MLAConfig, ModelConfig, MoEConfig, Recipe

FLOAT32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2}
STORED_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # per weight, scales left out


class WeightGroup(NamedTuple):
    """Weights of one shape and role, over the whole model."""

    kind: str  # embedding, attention, norm, ffn, router, experts, shared_experts, head, bias
    name: str
    shape: tuple[int, ...]
    copies: int  # stored
    active: int  # of those, touched by one token
    products: int  # matrix products with it per token
    trained: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Count(NamedTuple):
    """What a recipe costs; the field names are keys of `count --json`."""

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


class Sparsity(NamedTuple):
    """What is said of mixtures of experts, in figures; the field names are keys of `count --json`.

    FLOPs here are those of weights alone: attention's T x T square is the same for both models.
    """

    active_share: float  # of all parameters
    flops_per_token: int
    dense_flops_per_token: int  # of a dense model as large, which uses every weight
    compute_saved: float  # how many times fewer FLOPs than that
    n_experts: int
    experts_used: float  # by a token, per sparse layer
    expert_params: int  # of one expert in every sparse layer
    outside_params: int  # of all but the experts
    one_expert_params: int  # of the model with a single expert and no router
    all_models_params: int  # of n_experts such models


def weight_groups(model: ModelConfig) -> Iterator[WeightGroup]:
    """Every weight of the decoder, grouped; sums to the built model's parameters."""
    width, layers = model.d_model, model.n_layers
    yield WeightGroup("embedding", "embedding", (model.vocab_size, width), 1, 1, 0)
    if model.mla is None:
        yield from _attention(model)
    else:
        yield from _latent_attention(model, model.mla)
    yield WeightGroup("norm", "norms", (width,), 2 * layers + 1, 2 * layers + 1, 0)
    sparse = sparse_layers(model)
    if sparse < layers:
        yield from _ffn("ffn", model, model.d_ff, layers - sparse, layers - sparse)
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
    frozen = [g for g in groups if not g.trained]
    total, active = parameters(groups)
    kinds = params_by_kind(groups)
    forward = 2 * sum(g.size * g.products for g in groups) + attention_flops(model)
    cached = BYTES.get(recipe.trainer.precision, FLOAT32_BYTES) * kv_cache_numbers(model)
    return Count(
        total_params=total,
        active_params=active,
        embedding_params=kinds["embedding"] + kinds.get("head", 0),
        router_params=kinds.get("router", 0),
        forward_flops_per_token=forward,
        train_flops_per_token=3 * forward - 2 * sum(g.size * g.products for g in frozen),
        weight_bytes=FLOAT32_BYTES * total,
        gradient_bytes=FLOAT32_BYTES * (total - parameters(frozen)[0]),
        optimizer_bytes=_optimizer_bytes(recipe, groups),
        kv_cache_bytes_per_token=cached,
        params_by_kind=kinds,
    )


def parameters(groups: Iterable[WeightGroup]) -> tuple[int, int]:
    """All parameters, and those one token touches."""
    groups = list(groups)
    return sum(g.size * g.copies for g in groups), sum(g.size * g.active for g in groups)


def params_by_kind(groups: Iterable[WeightGroup], *, active: bool = False) -> dict[str, int]:
    """Parameters of each kind that is there, all or those one token touches."""
    kinds: dict[str, int] = {}
    for g in groups:
        kinds[g.kind] = kinds.get(g.kind, 0) + g.size * (g.active if active else g.copies)
    return {kind: n for kind, n in kinds.items() if n}


def attention_flops(model: ModelConfig) -> int:
    """Forward FLOPs per token of scores and weighted values over the full context."""
    keys = values = model.head_size
    if model.mla is not None:
        keys = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
        values = model.mla.v_head_dim
    return model.n_layers * 2 * model.context * model.n_heads * (keys + values)


def kv_cache_numbers(model: ModelConfig) -> int:
    """Numbers that generating keeps of a token: keys and values, or their latent and rotated key.

    The latter is DeepSeek-AI 2024 (DeepSeek-V2), table 1. A router that sees several positions
    keeps what it saw.
    """
    kept = 0
    if model.moe is not None and model.moe.router_window > 1:
        kept = model.d_model * sum(map(model.is_sparse, range(model.n_layers)))
    if model.mla is not None:
        return kept + model.n_layers * (model.mla.kv_lora_rank + model.mla.qk_rope_head_dim)
    return kept + model.n_layers * 2 * model.kv_heads * model.head_size


def sparsity(groups: Iterable[WeightGroup], n_experts: int) -> Sparsity:
    """What sparsity buys and does not, for `n_experts` routed experts per sparse layer."""
    groups = list(groups)
    kinds = params_by_kind(groups)
    total, active = parameters(groups)
    used = 2 * sum(g.size * g.products for g in groups)
    dense = 2 * sum(g.size * max(g.copies, g.products) for g in groups if g.products)
    experts = kinds["experts"]
    one_expert = total - kinds.get("router", 0) - experts + experts // n_experts
    return Sparsity(
        active_share=active / total,
        flops_per_token=used,
        dense_flops_per_token=dense,
        compute_saved=dense / used,
        n_experts=n_experts,
        experts_used=sum(g.size * g.active for g in groups if g.kind == "experts")
        / (experts // n_experts),
        expert_params=experts // n_experts,
        outside_params=total - experts,
        one_expert_params=one_expert,
        all_models_params=n_experts * one_expert,
    )


def stored_bytes(params: int) -> dict[str, float]:
    """Bytes that weights take, by precision."""
    return {precision: params * size for precision, size in STORED_BYTES.items()}


# --- groups --------------------------------------------------------------------------------------


def _attention(model: ModelConfig) -> Iterator[WeightGroup]:
    width, head, layers = model.d_model, model.head_size, model.n_layers
    for name, heads in (("q_proj", model.n_heads), ("k_proj", model.kv_heads)):
        yield _every_layer(model, name, (heads * head, width))
    yield _every_layer(model, "v_proj", (model.kv_heads * head, width))
    yield _every_layer(model, "o_proj", (width, model.n_heads * head))
    if model.qk_norm:
        yield WeightGroup("norm", "qk_norms", (head,), 2 * layers, 2 * layers, 0)


def _latent_attention(model: ModelConfig, mla: MLAConfig) -> Iterator[WeightGroup]:
    width, heads, layers = model.d_model, model.n_heads, model.n_layers
    queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        yield _every_layer(model, "q_proj", (queries, width))
    else:
        yield _every_layer(model, "q_a_proj", (mla.q_lora_rank, width))
        yield WeightGroup("norm", "q_a_norm", (mla.q_lora_rank,), layers, layers, 0)
        yield _every_layer(model, "q_b_proj", (queries, mla.q_lora_rank))
    yield _every_layer(model, "kv_a_proj", (mla.kv_lora_rank + mla.qk_rope_head_dim, width))
    yield WeightGroup("norm", "kv_a_norm", (mla.kv_lora_rank,), layers, layers, 0)
    rebuilt = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield _every_layer(model, "kv_b_proj", (rebuilt, mla.kv_lora_rank))
    yield _every_layer(model, "o_proj", (width, heads * mla.v_head_dim))


def _every_layer(model: ModelConfig, name: str, shape: tuple[int, int]) -> WeightGroup:
    return WeightGroup("attention", name, shape, model.n_layers, model.n_layers, model.n_layers)


def _ffn(
    kind: str, model: ModelConfig, hidden: int, copies: int, active: int
) -> Iterator[WeightGroup]:
    width = model.d_model
    if model.activation == "swiglu":
        yield WeightGroup(kind, "gate_up", (2 * hidden, width), copies, active, active)
    else:
        yield WeightGroup(kind, "up", (hidden, width), copies, active, active)
    yield WeightGroup(kind, "down", (width, hidden), copies, active, active)


def _moe_groups(model: ModelConfig, moe: MoEConfig, sparse: int) -> Iterator[WeightGroup]:
    hidden = model.expert_width
    yield from _router_groups(model, moe, sparse)
    yield from _ffn("experts", model, hidden, sparse * moe.n_experts, sparse * moe.top_k)
    if moe.n_shared_experts:
        shared = sparse * moe.n_shared_experts
        yield from _ffn("shared_experts", model, hidden, shared, shared)
    if moe.shared_expert_gate:
        gate = (1, model.d_model)
        yield WeightGroup("shared_experts", "shared_gate", gate, sparse, sparse, sparse)


def _router_groups(model: ModelConfig, moe: MoEConfig, sparse: int) -> Iterator[WeightGroup]:
    seen = (moe.n_experts, moe.router_window * model.d_model)
    if moe.routing != "hash":
        yield WeightGroup("router", "router", seen, sparse, sparse, sparse, moe.train_router)
    if moe.noisy_top_k:
        yield WeightGroup("router", "noise", seen, sparse, sparse, sparse)
    if moe.per_expert_scale:
        yield WeightGroup("router", "scale", (moe.n_experts,), sparse, sparse, 0)


def sparse_layers(model: ModelConfig) -> int:
    """How many layers hold experts."""
    return sum(model.is_sparse(layer) for layer in range(model.n_layers))


def _optimizer_bytes(recipe: Recipe, groups: list[WeightGroup]) -> int:
    """Muon keeps one momentum per hidden weight, AdamW two moments per weight."""
    hidden = {"attention", "ffn", "experts", "shared_experts"}
    muon = recipe.optim.name == "muon"

    def moments(g: WeightGroup) -> int:
        return 1 if muon and g.kind in hidden and g.name != "shared_gate" else 2

    return FLOAT32_BYTES * sum(g.size * g.copies * moments(g) for g in groups if g.trained)
