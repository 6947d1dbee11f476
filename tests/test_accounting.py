"""Counts from the recipe's fields equal what the built model holds, does and allocates.

The references are the model itself (its tensors, hooks and gradients), torch's own FLOP counter,
the optimizer's state after a step, and published parameter counts.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nano_moe.accounting import count, weight_groups
from nano_moe.config import MLAConfig, ModelConfig, MoEConfig
from nano_moe.model.cache import Cache
from nano_moe.model.gpt import GPT
from nano_moe.model.ops import RMSNorm
from nano_moe.training.optimizers import MuonAdamW, parameter_groups

LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 9}
MLA = {"mla": MLAConfig(**LATENT), "n_kv_heads": None}
MLA_Q = {"mla": MLAConfig(**LATENT, q_lora_rank=14), "n_kv_heads": None}

CASES = {
    "dense": (None, {}),
    "dense, untied, no GQA": (None, {"tie_embeddings": False, "n_kv_heads": None}),
    "dense, qk_norm, wide heads": (None, {"qk_norm": True, "head_dim": 10, "n_layers": 3}),
    "sparse": ({}, {}),
    "one expert": ({"n_experts": 1, "top_k": 1}, {}),
    "all experts": ({"n_experts": 4, "top_k": 4}, {}),
    "top-1, untied": ({"n_experts": 6, "top_k": 1}, {"tie_embeddings": False}),
    "given width": ({"d_expert": 24}, {"n_kv_heads": 1}),
    "shared": ({"n_experts": 5, "n_shared_experts": 2}, {}),
    "first layer dense": ({"first_k_dense": 1, "n_shared_experts": 2}, {"n_layers": 3}),
    "every second layer": ({"every_n_layers": 2}, {"n_layers": 5, "qk_norm": True}),
    "aux-free": ({"score": "sigmoid", "bias_update_rate": 0.1}, {}),
    "dense, gelu": (None, {"activation": "gelu"}),
    "gelu": ({"n_shared_experts": 2, "first_k_dense": 1}, {"activation": "gelu"}),
    "dense, latent attention": (None, MLA),
    "latent attention, latent queries": ({}, MLA_Q),
    "a window of the router": ({"router_window": 3}, {}),
    "noise": ({"noisy_top_k": True, "router_window": 2}, {}),
    "a scale per expert": ({"per_expert_scale": True}, {}),
    "gated shared": ({"n_shared_experts": 2, "shared_expert_gate": True}, {}),
    "groups": ({"n_groups": 2, "top_k_groups": 1, "group_score": "top2_sum"}, {}),
    "frozen router": ({"train_router": False}, {}),
    "hash": ({"routing": "hash", "per_expert_scale": True}, {}),
    "experts choose": ({"routing": "expert_choice"}, {}),
}


@pytest.fixture(params=CASES)
def config(request, dense_config, moe_config) -> ModelConfig:
    moe, fields = CASES[request.param]
    if moe is None:
        return dense_config(**fields)
    return moe_config(moe={"backend": "loop", **moe}, **fields)


def kind_of(name: str, module: torch.nn.Module) -> str:
    """The kind that a parameter counts as, from the place it has in the built model."""
    if isinstance(module, RMSNorm):
        return "norm"
    for part, kind in (
        (".router.", "router"), (".experts.", "experts"), (".shared", "shared_experts"),
        (".attention.", "attention"), (".ffn.", "ffn"), ("embedding.", "embedding"),
        ("head.", "head"),
    ):  # fmt: skip
        if part in name:
            return kind
    raise AssertionError(f"{name} is of no kind")


def test_parameters_equal_the_built_model_kind_by_kind(config, recipe_of):
    model = GPT(config)
    built: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(name, model.get_submodule(name.rpartition(".")[0]))
        built[kind] = built.get(kind, 0) + parameter.numel()
    counted = count(recipe_of(config))
    assert counted.params_by_kind == built
    assert counted.total_params == sum(p.numel() for p in model.parameters())
    assert counted.router_params == built.get("router", 0)
    assert counted.embedding_params == built["embedding"] + built.get("head", 0)


def test_every_weight_group_is_in_the_built_model(config):
    """Stored copies by shape; shared experts and a fused pair are stored as one wide weight."""
    model = GPT(config)
    counted = [g for g in weight_groups(config) if g.kind not in ("experts", "shared_experts")]
    stored = [
        tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".experts." not in name and ".shared" not in name
    ]
    assert sorted(stored) == sorted(g.shape for g in counted for _ in range(g.copies))


def test_active_parameters_are_those_one_token_touches(config, recipe_of, build):
    """A weight is touched when it gets a gradient; of stacked experts, those with one not zero."""
    if not config.is_causal:
        pytest.skip("what an expert takes depends on all tokens; the next test counts that")
    model = build(config)
    model(torch.zeros(1, 1, dtype=torch.int64))[0].square().sum().backward()
    active = 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or name.endswith("router.weight")
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.ndim == 3:
            visited = parameter.grad.flatten(1).any(-1)
            active += int(visited.sum()) * parameter[0].numel()
        else:
            active += parameter.numel()
    assert count(recipe_of(config)).active_params == active


def test_experts_that_choose_are_visited_top_k_times_per_token(moe_config, build, tokens):
    routings = build(moe_config(moe={"routing": "expert_choice"}))(tokens)[1]
    assert [int(routing.counts.sum()) for routing in routings] == [2 * tokens.numel()] * 2


def test_flops_equal_those_torch_counts(config, recipe_of, build):
    model, sequences = build(config), 3
    tokens = torch.randint(0, config.vocab_size, (sequences, config.context))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(tokens)[0]
        with FlopCounterMode(display=False) as backward:
            logits.square().sum().backward()
    counted = count(recipe_of(config))
    n_tokens = sequences * config.context
    assert counted.forward_flops_per_token * n_tokens == forward.get_total_flops()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert counted.train_flops_per_token * n_tokens == total


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_bytes_equal_those_allocated_for_a_step(config, recipe_of, build, name):
    recipe = recipe_of(config, optim={"name": name})
    model = build(config)
    optimizer = MuonAdamW(parameter_groups(model, recipe.optim), recipe.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states = [s for state in optimizer.state.values() for key, s in state.items() if key != "step"]
    counted = count(recipe)
    assert counted.optimizer_bytes == sum(s.nbytes for s in states)
    assert counted.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert counted.gradient_bytes == sum(
        p.grad.nbytes for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_kv_cache_is_what_a_full_decoder_holds_of_a_token(config, recipe_of, precision, itemsize):
    if config.moe is not None and config.moe.routing == "expert_choice":
        pytest.skip("cannot be decoded")
    cache = Cache(config, 1)
    GPT(config).eval()(torch.zeros(1, config.context, dtype=torch.int64), cache)
    held = sum(each.numel() for layer in cache.layers for each in layer.held.values())
    counted = count(recipe_of(config, trainer={"precision": precision}))
    assert counted.kv_cache_bytes_per_token == itemsize * held / config.context


def test_published_llama_2_70b(recipe_of):
    """68,976,648,192 weights (meta-llama/Llama-2-70b-hf); 320 KiB of bf16 cache per token."""
    model = ModelConfig(
        vocab_size=32_000, context=4096, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8,
        d_ff=28_672, tie_embeddings=False,
    )  # fmt: skip
    counted = count(recipe_of(model, trainer={"precision": "bf16"}))
    assert counted.total_params == counted.active_params == 68_976_648_192
    assert counted.kv_cache_bytes_per_token == 320 * 1024


def test_published_mixtral_8x7b(recipe_of):
    """46,702,792,704 weights (mistralai/Mixtral-8x7B-v0.1), of which a token uses 12.88B."""
    model = ModelConfig(
        vocab_size=32_000, context=32_768, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8,
        d_ff=28_672, tie_embeddings=False, moe=MoEConfig(n_experts=8, top_k=2, d_expert=14_336),
    )  # fmt: skip
    counted = count(recipe_of(model))
    assert counted.total_params == 46_702_792_704
    assert counted.active_params / 1e9 == pytest.approx(12.88, abs=0.005)


def test_a_derived_expert_width_keeps_the_dense_flops_but_for_the_router(
    dense_config, moe_config, recipe_of
):
    dense = count(recipe_of(dense_config(d_ff=96)))
    sparse = count(recipe_of(moe_config(moe={"n_experts": 8, "n_shared_experts": 1}, d_ff=96)))
    router = 2 * 2 * 8 * 16  # FLOPs of two layers' (E, D) products
    assert sparse.forward_flops_per_token - dense.forward_flops_per_token == router
