"""Memory of training on a CPU, from the recipe alone: what the backward pass needs, and the peak.

Kept are the tensors that autograd saves in a forward pass, each storage once: not the weights, nor
their bf16 copies (they grow with the model, not with the batch, and are in the peak alone), nor the
batch itself, nor the few numbers that a batch or sequence needs once. Counted is the path that
training takes on a CPU: the fused backend; PyTorch's flash attention, with its log-sum-exp, where
queries and values are equally wide, else its plain attention over the T x T square. Experts are
counted without the rows that pad their products (at most a quarter of the rows and 64 per expert)
and as if no capacity dropped a token.

b is the bytes of a number in matrix products: 4, or 2 under bf16 autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from nano_moe.accounting import BYTES, FLOAT32_BYTES, WeightGroup, count, weight_groups
from nano_moe.config import MLAConfig, ModelConfig, MoEConfig, Recipe

INT64_BYTES = 8
ROW_BYTES = INT64_BYTES + FLOAT32_BYTES  # token and weight of an expert's row
CHUNK_BYTES = {4: 4 * 2**20, 2: 64 * 2**20}  # of rows that experts work on at a time, by b
BUSIEST = 2.5  # times its share of assignments: what an expert of a young router may get
BATCH_BYTES = 8 * 2**20  # of matrices that Muon's iteration works on at a time
BATCHES = 5  # that live at once in the iteration
SPARE, SPARE_ROWS = 1.25, 64  # rows of experts that share a product: over their loads, and each
PRODUCT_BYTES = 600 * 2**10  # that oneDNN holds of a product once compiled
PRODUCTS = 6  # of a group of experts: two forward, four backward
WIDE_HEAD = 64  # narrower ones attend in float32
ROUNDED = {"attention", "ffn", "experts", "shared_experts", "head"}  # weights copied in bf16
MUON = {"attention", "ffn", "experts", "shared_experts"}


class Kept(NamedTuple):
    """Bytes per token from forward to backward pass; the field names are keys of `count --json`."""

    norms: int = 0
    attention: int = 0
    ffn: int = 0
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    head: int = 0  # and loss


class Peak(NamedTuple):
    """The fullest moment of a training step; the field names are keys of `count --json`."""

    bytes: int
    moment: str  # "loss", "backward" or "optimizer"


def kept_per_token(model: ModelConfig, precision: str, *, checkpointing: bool) -> Kept:
    """Activations that training keeps of one token, in bytes, by part.

    With `checkpointing` a block keeps its input alone, counted with the norm that reads it.
    """
    b = BYTES[precision]
    of_layer = _input if checkpointing else _layer
    layers = [of_layer(model, _moe(model, layer), b) for layer in range(model.n_layers)]
    return Kept(*map(sum, zip(*layers, _end(model, b), strict=True)))


def peak(recipe: Recipe, precision: str) -> Peak:
    """The most that a training step holds at a time, weights and optimizer state included."""
    return max(_moments(recipe, BYTES[precision]), key=lambda moment: moment.bytes)


def compiled_at_most(recipe: Recipe, precision: str) -> int:
    """Bytes of experts' products that oneDNN compiles in bf16, and holds beside the step's peak.

    A product of each number of experts and of rows that the router's loads may ask for; a run
    meets few of them in its first steps and most of them in the end.
    """
    model, b = recipe.model, BYTES[precision]
    if model.moe is None or b == FLOAT32_BYTES:
        return 0
    tokens, n_experts, shapes = _tokens(recipe), 1, 0
    while n_experts <= model.moe.n_experts:
        together = int(SPARE * tokens * model.moe.top_k / n_experts + SPARE_ROWS)
        shapes += _row_counts(tokens if n_experts == 1 else min(tokens, together))
        n_experts *= 2
    return PRODUCT_BYTES * PRODUCTS * shapes


# --- kept ----------------------------------------------------------------------------------------


def _moe(model: ModelConfig, layer: int) -> MoEConfig | None:
    return model.moe if model.is_sparse(layer) else None


def _layer(model: ModelConfig, moe: MoEConfig | None, b: int) -> Kept:
    attention = _attention(model, b) if model.mla is None else _latent(model, model.mla, b)
    kept = Kept(norms=2 * FLOAT32_BYTES * model.d_model, attention=attention)
    if moe is None:
        return kept._replace(ffn=b * model.d_model + _hidden(model, model.d_ff, b))
    return kept._replace(
        router=_router(model, moe, b),
        experts=_experts(model, moe, b),
        shared_experts=_shared(model, moe, b),
    )


def _input(model: ModelConfig, moe: MoEConfig | None, b: int) -> Kept:
    """Of a block that is computed again; the z-loss stays, which is outside of it."""
    return Kept(norms=FLOAT32_BYTES * model.d_model, router=_z_loss(moe) if moe else 0)


def _end(model: ModelConfig, b: int) -> Kept:
    """Inputs of the last norm and of the head, logits, targets, their largest, and the sum."""
    head = b * (model.d_model + model.vocab_size) + INT64_BYTES + 2 * FLOAT32_BYTES
    return Kept(norms=FLOAT32_BYTES * model.d_model, head=head)


def _attention(model: ModelConfig, b: int) -> int:
    """Input, projections, rotated queries and keys, output; the log-sum-exp of each head."""
    inputs, attended = b * _readers(3, b) * model.d_model, _attended(model, b)
    queries, keys = model.n_heads * model.head_size, model.kv_heads * model.head_size
    rounded = b * queries if attended > b else 0  # the output as the next product reads it
    projected, seen = b * (queries + keys), attended * 2 * (queries + keys)
    return inputs + projected + seen + rounded + FLOAT32_BYTES * model.n_heads


def _attended(model: ModelConfig, b: int) -> int:
    """Bytes of a number in attention itself, where narrow heads stay in float32."""
    return FLOAT32_BYTES if model.mla is None and model.head_size < WIDE_HEAD else b


def _readers(products: int, b: int) -> int:
    """Copies kept of what several products read: one, or in bf16 one for each."""
    return products if b < FLOAT32_BYTES else 1


def _latent(model: ModelConfig, mla: MLAConfig, b: int) -> int:
    heads, width = model.n_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim
    kept = b * _readers(2, b) * model.d_model + _compressed(mla.kv_lora_rank, b)
    kept += _compressed(mla.q_lora_rank, b) if mla.q_lora_rank is not None else 0
    output = b * heads * mla.v_head_dim
    if width == mla.v_head_dim:
        rebuilt = b * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return kept + 2 * b * heads * width + rebuilt + 2 * output + FLOAT32_BYTES * heads
    plain = 2 * width + mla.v_head_dim + model.context  # queries, keys, values, shares: float32
    return kept + FLOAT32_BYTES * heads * plain + output


def _compressed(rank: int, b: int) -> int:
    """A latent and its normalized form; in bf16 the norm keeps the latent wide, and its scale."""
    return 2 * b * rank + (FLOAT32_BYTES * (rank + 1) if b < FLOAT32_BYTES else 0)


def _hidden(model: ModelConfig, width: int, b: int) -> int:
    """Of a hidden layer: SwiGLU's first product and a weight, or both sides of GELU."""
    return 2 * b * width + (FLOAT32_BYTES if model.activation == "swiglu" else 0)


def _experts(model: ModelConfig, moe: MoEConfig, b: int) -> int:
    """Their input, where each assignment's row is, and the rows of the first product."""
    first = b * model.expert_width * (2 if model.activation == "swiglu" else 1)
    places = moe.n_experts if moe.routing == "expert_choice" else moe.top_k
    return b * model.d_model + INT64_BYTES * places + moe.top_k * (first + ROW_BYTES)


def _shared(model: ModelConfig, moe: MoEConfig, b: int) -> int:
    if not moe.n_shared_experts:
        return 0
    own = b * (_readers(2, b) - 1) * model.d_model  # else the experts' input
    kept = own + _hidden(model, moe.n_shared_experts * model.expert_width, b)
    return kept + (own + b * (1 + model.d_model) if moe.shared_expert_gate else 0)


def _router(model: ModelConfig, moe: MoEConfig, b: int) -> int:
    """What it sees where that is not the experts' input, its scores, and the choice."""
    scale = FLOAT32_BYTES * moe.top_k if moe.per_expert_scale else 0
    ids = INT64_BYTES * moe.top_k
    if moe.routing == "hash":
        return scale + ids if scale else 0
    scores = FLOAT32_BYTES * moe.n_experts
    kept = _seen(model, moe, b) + scores + _z_loss(moe)
    kept += 2 * scores if moe.noisy_top_k else 0
    if moe.load_balancing_loss and moe.score == "sigmoid":
        kept += 2 * FLOAT32_BYTES
    if moe.routing == "expert_choice":
        return kept + (scores if scale else 0)
    normalized = FLOAT32_BYTES * (2 + moe.top_k) if moe.normalizes else 0
    return kept + ids + normalized + 2 * scale


def _seen(model: ModelConfig, moe: MoEConfig, b: int) -> int:
    width = FLOAT32_BYTES * model.d_model
    jitter = width if moe.router_jitter else 0
    shared = moe.router_window == 1 and not jitter and b == FLOAT32_BYTES
    return jitter + (moe.router_window * width if moe.train_router and not shared else 0)


def _z_loss(moe: MoEConfig) -> int:
    return FLOAT32_BYTES * (moe.n_experts + 1) if moe.router_z_loss else 0


# --- the peak ------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """Bytes of a layer, or of head and loss, for one micro-batch."""

    kept: int  # from forward to backward pass, copies of weights included
    again: int  # what checkpointing keeps once more, in the backward pass
    gradient: int  # of weights
    work: int  # of the backward pass at its fullest


def _moments(recipe: Recipe, b: int) -> Iterator[Peak]:
    """Live bytes at the loss, in each layer's backward pass and after it, in the optimizer."""
    counted, model = count(recipe), recipe.model
    state = counted.weight_bytes + counted.optimizer_bytes
    gradients = counted.gradient_bytes if recipe.trainer.accumulate > 1 else 0
    stages = {sparse: _stage(recipe, sparse, b) for sparse in {*map(model.is_sparse, _all(model))}}
    head, layers = _head(recipe, b), [stages[model.is_sparse(layer)] for layer in _all(model)]
    live = state + sum(layer.kept for layer in layers)
    yield Peak(live + gradients + head.kept + head.work, "loss")
    gradients += head.gradient
    for layer in reversed(layers):
        new = gradients + layer.gradient
        yield Peak(live + new + layer.again + layer.work, "backward")
        gradients = gradients if recipe.trainer.accumulate > 1 else new
        live -= layer.kept
    yield Peak(state + counted.gradient_bytes + head.gradient, "backward")  # and the embedding's
    yield Peak(state + counted.gradient_bytes + _optimizer_work(recipe), "optimizer")


def _all(model: ModelConfig) -> range:
    return range(model.n_layers)


def _tokens(recipe: Recipe) -> int:
    return recipe.trainer.batch_size * recipe.model.context


def _head(recipe: Recipe, b: int) -> _Stage:
    model, tokens = recipe.model, _tokens(recipe)
    weights = model.vocab_size * model.d_model
    copies = b * weights if b < FLOAT32_BYTES else 0
    kept = tokens * sum(_end(model, b)) + copies
    return _Stage(kept, 0, FLOAT32_BYTES * weights, tokens * b * model.vocab_size)


def _stage(recipe: Recipe, sparse: bool, b: int) -> _Stage:
    model, tokens = recipe.model, _tokens(recipe)
    moe, groups = model.moe if sparse else None, _groups(model, sparse)
    rounded = sum(g.size * g.copies for g in groups if g.kind in ROUNDED)
    kept = tokens * sum(_layer(model, moe, b)) + (b * rounded if b < FLOAT32_BYTES else 0)
    first = tokens * sum(_input(model, moe, b))
    gradient = FLOAT32_BYTES * sum(g.size * g.copies for g in groups if g.trained)
    again = recipe.trainer.activation_checkpointing
    work = _work(model, moe, tokens, b)
    return _Stage(first if again else kept, kept if again else 0, gradient, work)


def _groups(model: ModelConfig, sparse: bool) -> list[WeightGroup]:
    """Weights of one layer; a stack of experts is one parameter of `size * copies`."""
    moe = model.moe and model.moe.model_copy(update={"first_k_dense": 0, "every_n_layers": 1})
    one = model.model_copy(update={"n_layers": 1, "moe": moe if sparse else None})
    return [g for g in weight_groups(one) if g.kind not in ("embedding", "head")]


def _work(model: ModelConfig, moe: MoEConfig | None, tokens: int, b: int) -> int:
    """Gradients of the residual stream, and of feed-forward or, when that is done, of attention."""
    stream, kept = 2 * FLOAT32_BYTES * model.d_model, _layer(model, moe, b)
    freed = sum(kept) - kept.attention - kept.norms // 2
    inside = b * tokens * _hidden_work(model) * model.d_ff
    inside = inside if moe is None else _experts_work(model, moe, tokens, b)
    return stream * tokens + max(
        inside, (_attended(model, b) * _attention_work(model) - freed) * tokens
    )


def _attention_work(model: ModelConfig) -> int:
    """Gradients of the output, and of queries, keys and values."""
    if model.mla is not None:
        return 4 * model.n_heads * (model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim)
    return 2 * (model.n_heads + model.kv_heads) * model.head_size


def _hidden_work(model: ModelConfig) -> int:
    """SwiGLU's hidden layer, its gradient, both sides' gradients; GELU's alone, in its place."""
    return 4 if model.activation == "swiglu" else 1


def _experts_work(model: ModelConfig, moe: MoEConfig, tokens: int, b: int) -> int:
    """The rows' gradients, and all that a group of experts works on; or the shared experts."""
    assigned, row = tokens * moe.top_k, _row_bytes(model, b)
    busiest = min(tokens, int(BUSIEST * assigned / moe.n_experts))
    group = min(assigned * row, max(CHUNK_BYTES[b], busiest * row))
    shared = _hidden_work(model) * moe.n_shared_experts * model.expert_width
    return max(b * tokens * shared, b * assigned * model.d_model + group)


def _row_bytes(model: ModelConfig, b: int) -> int:
    return b * (2 * model.d_model + 4 * model.expert_width)


def _row_counts(most: int) -> int:
    """Numbers of rows, up to `most`, that bf16 products are padded to."""
    return most // 32 if most <= 512 else 16 + int(8 * math.log2(most / 512))


def _optimizer_work(recipe: Recipe) -> int:
    """Muon's iteration over a batch of matrices, in float32; AdamW works in place."""
    if recipe.optim.name != "muon":
        return 0
    batches = [0]
    for sparse in {*map(recipe.model.is_sparse, _all(recipe.model))}:
        for group in _groups(recipe.model, sparse):
            if group.kind in MUON:
                stack = FLOAT32_BYTES * group.size * group.copies * recipe.model.n_layers
                batches.append(max(FLOAT32_BYTES * group.size, min(BATCH_BYTES, stack)))
    return BATCHES * max(batches)
