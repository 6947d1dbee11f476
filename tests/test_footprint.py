"""What the footprint says is what autograd saves, and what PyTorch allocates, in a real step.

The reference of kept bytes is `saved_tensors_hooks`: what is still held when the forward pass is
over, each storage once, the model's own and the batch left out. What does not grow with the batch
(bf16 copies of weights) falls out by taking the difference of two batches. That of the peak is the
profiler's record of every allocation.
"""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nano_moe.accounting import FLOAT32_BYTES, count
from nano_moe.config import MLAConfig, ModelConfig, Recipe
from nano_moe.evaluation import autocast
from nano_moe.footprint import (
    BATCH_BYTES,
    CHUNK_BYTES,
    PRODUCT_BYTES,
    PRODUCTS,
    SPARE,
    SPARE_ROWS,
    WIDE_HEAD,
    compiled_at_most,
    kept_per_token,
    peak,
)
from nano_moe.model import attention, fused
from nano_moe.training.module import Decoder
from nano_moe.training.optimizers import NEWTON_SCHULZ_BYTES

EQUAL = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
MLA = {"mla": MLAConfig(**EQUAL), "n_kv_heads": None}
MLA_Q = {"mla": MLAConfig(**EQUAL, q_lora_rank=14), "n_kv_heads": None}
MLA_PLAIN = {"mla": MLAConfig(**EQUAL | {"v_head_dim": 8}), "n_kv_heads": None}
GELU = {"activation": "gelu"}
LOSSES = {"load_balancing_loss": 0.01, "router_z_loss": 0.001}

CASES = {
    "dense": (None, {}),
    "dense, untied, no GQA": (None, {"tie_embeddings": False, "n_kv_heads": None}),
    "dense, qk_norm, wide heads": (None, {"qk_norm": True, "head_dim": 64, "n_layers": 3}),
    "dense, gelu": (None, GELU),
    "dense, latent attention": (None, MLA),
    "latent attention, latent queries": ({}, MLA_Q),
    "latent attention without flash": ({}, MLA_PLAIN),
    "mixtral": (LOSSES, {}),
    "switch": ({"top_k": 1} | LOSSES, {}),
    "one expert": ({"n_experts": 1, "top_k": 1}, {}),
    "deepseek": ({"n_experts": 6, "top_k": 3, "n_shared_experts": 1, "d_expert": 8} | LOSSES, {}),
    "deepseek-v3": (
        {
            "n_experts": 6, "top_k": 3, "n_shared_experts": 1, "d_expert": 8, "first_k_dense": 1,
            "score": "sigmoid", "bias_update_rate": 0.01,
        },
        {"n_layers": 3},
    ),
    "sigmoid with losses": ({"score": "sigmoid"} | LOSSES, {}),
    "by sequence": ({"score": "sigmoid", "balance_scope": "sequence"} | LOSSES, {}),
    "gelu": ({"n_shared_experts": 2, "first_k_dense": 1, "d_expert": 8}, GELU),
    "gated shared": ({"n_shared_experts": 2, "shared_expert_gate": True, "d_expert": 8}, {}),
    "gated shared, gelu": (
        {"n_shared_experts": 2, "shared_expert_gate": True, "d_expert": 8}, GELU,
    ),
    "a window of the router": ({"router_window": 3}, {}),
    "noise": ({"noisy_top_k": True} | LOSSES, {}),
    "jitter": ({"router_jitter": 0.1}, {}),
    "jitter before a frozen router": ({"router_jitter": 0.1, "train_router": False}, {}),
    "frozen router": ({"train_router": False}, {}),
    "a scale per expert": ({"per_expert_scale": True}, {}),
    "a scale per expert, top-1": ({"per_expert_scale": True, "top_k": 1}, {}),
    "sigmoid, shares of the whole step": (
        {"score": "sigmoid", "balance_scope": "global_batch"} | LOSSES, {},
    ),
    "a capacity that nothing exceeds": ({"capacity_factor": 4.0} | LOSSES, {}),
    "every second layer, scaled weights": (
        {"every_n_layers": 2, "routed_scaling_factor": 2.5}, {"n_layers": 4},
    ),
    "groups": ({"n_groups": 2, "top_k_groups": 1, "group_score": "top2_sum"}, {}),
    "hash": ({"routing": "hash"}, {}),
    "hash, a scale per expert": ({"routing": "hash", "per_expert_scale": True}, {}),
    "experts choose": ({"routing": "expert_choice", "router_z_loss": 0.01}, {}),
    "experts choose, scaled": ({"routing": "expert_choice", "per_expert_scale": True}, {}),
}  # fmt: skip
PRECISIONS = ["fp32", "bf16"]


@pytest.fixture(params=CASES)
def case(request, dense_config, moe_config):
    moe, fields = CASES[request.param]
    return dense_config(**fields) if moe is None else moe_config(moe=moe, **fields)


@pytest.fixture
def unpadded(monkeypatch):
    """Each expert in a product of its own, so that no row is padding."""

    def plan(counts: list[int], most: int, dtype: torch.dtype) -> list[fused.Chunk]:
        starts = [sum(counts[:expert]) for expert in range(len(counts))]
        return [fused.Chunk(e, e + 1, n, starts[e]) for e, n in enumerate(counts) if n]

    monkeypatch.setattr(fused, "plan", plan)


class Saved:
    """What autograd holds in a tensor's place."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(recipe: Recipe, precision: str, n_sequences: int) -> int:
    """Bytes that a forward pass leaves for the backward pass, beside the model and the batch."""
    torch.manual_seed(0)
    module = Decoder(recipe).train()
    batch = torch.randint(0, recipe.model.vocab_size, (n_sequences, recipe.model.context + 1))
    there = [*module.parameters(), *module.buffers(), batch]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: torch.Tensor) -> Saved:
        holder = Saved(tensor.detach())  # else a saved output and its graph hold each other
        saved.append(weakref.ref(holder))
        return holder

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor)
    with hooks, autocast(torch.device("cpu"), precision):
        output = module.training_step(batch, 0)
    assert output["loss"].requires_grad
    alive = [holder.tensor.untyped_storage() for holder in (ref() for ref in saved) if holder]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kept_bytes_are_those_that_autograd_saves(
    case, recipe_of, unpadded, precision, checkpointing
):
    recipe = recipe_of(case, trainer={"activation_checkpointing": checkpointing})
    more = saved_bytes(recipe, precision, 4) - saved_bytes(recipe, precision, 2)
    counted = kept_per_token(case, precision, checkpointing=checkpointing)
    assert more == 2 * (case.context * sum(counted) + shares_of_a_sequence(case))


def shares_of_a_sequence(model: ModelConfig) -> int:
    """Bytes that balance within sequences keeps of each: the experts' shares, in every layer."""
    if model.moe is None or model.moe.balance_scope != "sequence":
        return 0
    return FLOAT32_BYTES * model.moe.n_experts * model.n_layers


# --- the peak ------------------------------------------------------------------------------------

MIDDLING = {"d_model": 128, "n_layers": 3, "d_ff": 384, "context": 128, "vocab_size": 1024}
FEW_TOKENS = {"vocab_size": 264}
WIDE = {"d_model": 384, "d_ff": 1024, "n_heads": 6, "n_kv_heads": None, "vocab_size": 264}
EIGHT = {"n_experts": 8, "top_k": 2} | LOSSES
SIXTY_FOUR = {"n_experts": 64, "top_k": 8} | LOSSES
AGAIN, BF16 = {"activation_checkpointing": True}, {"precision": "bf16"}

# experts, model, trainer, optimizer, and the fullest moment where it is so by far
PEAKS = {
    "dense": (None, {}, {}, {}, "loss"),
    "dense, bf16, checkpointed": (None, FEW_TOKENS, BF16 | AGAIN, {}, "backward"),
    "gelu, checkpointed": (None, FEW_TOKENS | GELU, AGAIN, {}, "backward"),
    "wide heads": (None, FEW_TOKENS | {"head_dim": 64, "d_ff": 64}, AGAIN, {}, "backward"),
    "latent attention": (None, FEW_TOKENS | MLA, {}, {}, "backward"),
    "8 top-2, bf16": (EIGHT, {}, BF16, {}, None),
    "8 top-2, twice": (EIGHT, {}, {"accumulate": 2, "batch_size": 8}, {}, None),
    "8 top-2, checkpointed": (EIGHT, FEW_TOKENS, AGAIN, {}, "backward"),
    "64 top-8, bf16": (SIXTY_FOUR, {"d_ff": 512}, BF16, {}, "backward"),
    "shared experts": (EIGHT | {"n_shared_experts": 2, "d_expert": 96}, {}, {}, {}, "loss"),
    "many tokens in the vocabulary": (None, {"vocab_size": 16384}, {"batch_size": 2}, {}, "loss"),
    "a large model": (None, WIDE, {"batch_size": 1}, {}, "optimizer"),
    "a large model, bf16": (None, WIDE, BF16 | {"batch_size": 1}, {"name": "adamw"}, "backward"),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_what_a_step_has_allocated_at_most(name, recipe_of, dense_config, moe_config):
    experts, fields, trainer, optim, moment = PEAKS[name]
    fields = MIDDLING | fields
    model = dense_config(**fields) if experts is None else moe_config(moe=experts, **fields)
    optim = {"newton_schulz": "fp32"} | optim
    recipe = recipe_of(model, optim=optim, trainer={"batch_size": 16} | trainer)
    predicted = peak(recipe, recipe.trainer.precision)
    assert predicted.bytes == pytest.approx(allocated_at_most(recipe), rel=0.1)
    assert moment in (predicted.moment, None)


def allocated_at_most(recipe: Recipe) -> int:
    """Bytes of the second step at its fullest, by the profiler's record, and of what it found."""
    torch.manual_seed(0)
    module = Decoder(recipe).train()
    (optimizer,), _ = module.configure_optimizers()
    shape = (recipe.trainer.batch_size, recipe.model.context + 1)
    batch = torch.randint(0, recipe.model.vocab_size, shape)
    bf16 = autocast(torch.device("cpu"), recipe.trainer.precision)

    def step() -> None:
        for _ in range(recipe.trainer.accumulate):
            with bf16:
                loss = module.training_step(batch, 0)["loss"]
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    counted = count(recipe)
    return counted.weight_bytes + counted.optimizer_bytes + max(itertools.accumulate(sizes))


def test_no_loads_ask_for_more_compiled_products_than_are_counted(recipe_of, moe_config):
    recipe = recipe_of(moe_config(moe=EIGHT, **MIDDLING), trainer={"batch_size": 16})
    tokens = recipe.trainer.batch_size * recipe.model.context
    most = compiled_at_most(recipe, "bf16") / (PRODUCTS * PRODUCT_BYTES)
    draw, shapes = torch.Generator().manual_seed(0), set()
    for skew in (0.0, 0.3, 1.0, 3.0):
        for _ in range(300):
            scores = skew * torch.randn(8, generator=draw) + torch.randn(tokens, 8, generator=draw)
            counts = scores.topk(2).indices.flatten().bincount(minlength=8).tolist()
            row_bytes = 2 * (MIDDLING["d_model"] + 4 * recipe.model.expert_width)
            room = fused.CHUNK_BYTES[torch.bfloat16] // row_bytes
            for chunk in fused.lay_out(counts, room, torch.bfloat16).chunks:
                shapes.add((chunk.last - chunk.first, chunk.rows))
    assert 0.5 * most <= len(shapes) <= most
    assert compiled_at_most(recipe, "fp32") == 0


def test_the_footprint_works_with_the_sizes_that_training_does():
    for dtype, b in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert CHUNK_BYTES[b] == fused.CHUNK_BYTES.get(dtype, fused.CACHE_BYTES)
    assert (SPARE, SPARE_ROWS) == (fused.SPARE, fused.SPARE_ROWS)
    assert BATCH_BYTES == NEWTON_SCHULZ_BYTES
    assert WIDE_HEAD == attention.WIDE_HEAD
