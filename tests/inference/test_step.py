"""Decoding by kernels: logits of the uncached forward pass, whatever the model and the rows.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from combinations import models
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nano_moe.config import MLAConfig, ModelConfig, MoEConfig
from nano_moe.inference import step
from nano_moe.inference.decoding import Decoding
from nano_moe.model.gpt import GPT, init_weights

MLA = MLAConfig(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6)
BIASED = {"score": "sigmoid", "bias_update_rate": 0.01}
KINDS: dict[str, dict] = {
    "dense": {"moe": None},
    "gelu": {"moe": None, "activation": "gelu"},
    "odd widths": {"moe": None, "d_model": 35, "head_dim": 6, "d_ff": 37, "vocab_size": 51},
    "odd, gelu": {"moe": None, "d_model": 35, "head_dim": 6, "d_ff": 37, "activation": "gelu"},
    "one head": {"n_heads": 1, "n_kv_heads": 1},
    "grouped": {"n_kv_heads": 1, "qk_norm": True},
    "untied": {"tie_embeddings": False},
    "softmax": {"top_k": 2},
    "top-1": {"top_k": 1},
    "all": {"top_k": 5},
    "sparse gelu": {"activation": "gelu"},
    "not normalized": {"normalize_top_k": False},
    "sigmoid": {**BIASED},
    "shared": {"n_shared_experts": 2, "d_expert": 7},
    "gated": {"n_shared_experts": 1, "shared_expert_gate": True, "d_expert": 8},
    "first dense": {"first_k_dense": 1, **BIASED, "routed_scaling_factor": 2.5},
    "scale": {"per_expert_scale": True, "routed_scaling_factor": 0.5},
    "training only": {"noisy_top_k": True, "router_jitter": 0.1, "capacity_factor": 0.5},
}
LEFT: dict[str, dict] = {
    "latent attention": {"mla": MLA, "n_kv_heads": None},
    "hash": {"routing": "hash"},
    "groups": {"n_experts": 6, "n_groups": 3, "top_k_groups": 2},
    "window": {"router_window": 3},
}
SIZES = {"vocab_size": 50, "context": 20, "n_layers": 2, "d_ff": 36, "init_std": 0.2}


def config_of(fields: dict) -> ModelConfig:
    fields = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, **SIZES, **fields}
    moe = {name: fields.pop(name) for name in list(fields) if name in MoEConfig.model_fields}
    if "moe" not in fields:
        fields["moe"] = MoEConfig(**{"n_experts": 5, "top_k": 2, "d_expert": 19, **moe})
    return ModelConfig(**fields)


def built(config: ModelConfig) -> GPT:
    """Its weights drawn, and everything that starts at 0 or 1 too."""
    model = init_weights(GPT(config), seed=5).eval()
    generator = torch.Generator().manual_seed(6)
    for name, weight in model.state_dict().items():
        if name.endswith(("expert_bias", "router.scale", "norm.weight")):
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def check(model: GPT, lengths: list[int], n_steps: int, ends: dict[int, int]) -> int:
    """Every logit of rows of these lengths that grow, of which one ends after some steps.

    How many of the steps were a `Step`'s.
    """
    draw = torch.Generator().manual_seed(7)
    vocab, context = model.config.vocab_size, model.config.context
    rows = [torch.randint(vocab, (n,), generator=draw).tolist() for n in lengths]
    decoding, by_kernels = Decoding(model, rows), 0
    rows = [row[-context:] for row in rows]
    for number in range(n_steps):
        found = decoding.next_logits()
        by_kernels += decoding._step is not None
        if any(len(row) > context for row in rows):
            rows = [row if len(row) <= context else row[-(context // 2) :] for row in rows]
        expected = torch.stack([model(torch.tensor([row]))[0][0, -1] for row in rows])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        tokens = torch.randint(vocab, (len(rows),), generator=draw).tolist()
        stays = [ends.get(row) != number for row in range(len(rows))]
        decoding.append(tokens, stays)
        kept = zip(rows, tokens, stays, strict=True)
        rows = [[*row, token] for row, token, stay in kept if stay]
    return by_kernels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [1, 3, 9])
def test_logits_are_those_of_the_forward_pass(kind, n_rows):
    """Past the context, too, and with rows of different lengths of which two end."""
    model = built(config_of(KINDS[kind]))
    assert step.fits(model)
    ends = {} if n_rows == 1 else {1: 3, 0: 9}
    assert check(model, [2 + 5 * n % 11 for n in range(n_rows)], 24, ends) == 24


def test_the_cache_grows_with_the_rows():
    """Past the 64 places that it starts with, and past those it has next."""
    model = built(config_of({"context": 200, "n_layers": 1, "top_k": 1}))
    assert check(model, [60, 50], 90, {}) == 90


@pytest.mark.parametrize("kind", LEFT)
def test_what_no_kernel_computes_is_left_to_the_model(kind):
    model = built(config_of(LEFT[kind]))
    assert not step.fits(model)
    assert check(model, [3, 5], 8, {}) == 0


def test_many_rows_are_left_to_products_of_matrices():
    model = built(config_of({"moe": None}))
    few = step.ROWS_BY_WIDTH // 32
    assert step.fits(model, few) and not step.fits(model, few + 1)
    wide = GPT(config_of({"moe": None, "d_model": 4096, "n_heads": 2, "d_ff": 2, "n_layers": 1}))
    assert step.fits(wide.eval(), 16) and not step.fits(wide, 17)


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(models(), st.lists(st.integers(1, 10), min_size=1, max_size=6))
def test_any_recipe_decodes_to_its_own_logits(config, lengths):
    assume(config.is_causal)
    check(built(config), lengths, 10, {0: 4} if len(lengths) > 1 else {})


def test_of_equal_scores_the_first_experts_are_taken():
    model = built(config_of({"top_k": 2}))
    for router in model.routers:
        router.weight.data.zero_()  # equal rows need not have equal products in PyTorch
    assert check(model, [4, 4, 6], 8, {}) == 8
    for block in model.blocks:  # so that the experts that were not taken would be heard
        block.ffn.experts.down.data[:2] = 0
    logits = Decoding(model, [[1, 2]])
    logits.next_logits()
    logits.append([3], [True])
    found = logits.next_logits()
    for block in model.blocks:
        block.ffn.experts.down.data[2:] = 0
    torch.testing.assert_close(found, model(torch.tensor([[1, 2, 3]]))[0][:, -1].detach())


def test_who_listens_hears_every_step():
    model, heard = built(config_of({})), []
    decoding = Decoding(model, [[1, 2, 3]])
    model.routers[0].register_forward_hook(lambda _, __, routing: heard.append(len(routing.ids)))
    for token in range(4):
        decoding.next_logits()
        decoding.append([token], [True])
    assert heard == [3, 1, 1, 1]


@pytest.mark.parametrize("change", ["training", "double", "bfloat16", "part", "autocast"])
def test_what_would_compute_otherwise_does_not_fit(change):
    model = built(config_of({}))
    assert step.fits(model)
    if change == "training":
        model.train()
    elif change in ("double", "bfloat16"):
        model.to(getattr(torch, "float64" if change == "double" else change))
    elif change == "part":
        model.head = torch.nn.Sequential(model.head)
    with torch.autocast("cpu", enabled=change == "autocast"):
        assert not step.fits(model)


@torch.no_grad()
def test_weights_are_read_where_they_lie():
    """None is copied, so a change of one is heard at once."""
    model = built(config_of({}))
    decoding = Decoding(model, [[1, 2]])
    decoding.next_logits()
    decoding.append([3], [True])
    model.head.weight.zero_()
    assert not decoding.next_logits().any()


@pytest.mark.slow
def test_threads_share_the_work(monkeypatch):
    """With any work shared out, the logits stay those of the forward pass."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(step, "SHARED", 0)
    torch.set_num_threads(2)
    try:
        for fields in ({}, {"moe": None, "activation": "gelu"}):
            assert check(built(config_of(fields)), [3, 5, 9, 4, 2], 8, {}) == 8
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_only_chosen_experts_are_touched():
    """Weights of the others are not numbers, and nobody notices."""
    model = built(config_of({"n_shared_experts": 1}))
    chosen = [set() for _ in model.routers]
    listening = [
        router.register_forward_hook(lambda _, __, r, own=own: own.update(r.ids[-1].tolist()))
        for router, own in zip(model.routers, chosen, strict=True)
    ]
    expected = model(torch.tensor([[1, 2, 3]]))[0][:, -1]
    for handle in listening:
        handle.remove()
    decoding = Decoding(model, [[1, 2]])
    decoding.next_logits()
    decoding.append([3], [True])
    sparse = [block.ffn.experts for block in model.blocks]
    for experts, own in zip(sparse, chosen, strict=True):
        others = [expert for expert in range(5) if expert not in own]
        assert len(others) == 3
        for weight in experts.weights:
            weight[others] = float("nan")
    torch.testing.assert_close(decoding.next_logits(), expected, rtol=1e-5, atol=1e-5)
