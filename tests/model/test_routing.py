"""The router's contract: ids, weights, probabilities and counts agree, in full precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.model.moe import MoE
from nano_moe.model.ops import at_least_float32
from nano_moe.model.router import Router
from nano_moe.model.routing import count_tokens


def router_of(moe_config, **moe) -> Router:
    torch.manual_seed(0)
    router = Router(moe_config(moe={"d_expert": 8, **moe}))
    torch.nn.init.normal_(router.weight)
    return router


@given(
    st.integers(1, 8).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    st.sampled_from(("softmax", "sigmoid")),
    st.sampled_from((None, False)),
    st.integers(1, 30),
)
def test_fields_of_a_routing_agree(moe_config, sizes, score, normalize, n_tokens):
    n_experts, top_k = sizes
    router = router_of(
        moe_config, n_experts=n_experts, top_k=top_k, score=score, normalize_top_k=normalize
    )
    routing = router(torch.randn(n_tokens, 16))
    logits = routing.logits.detach().double().numpy()
    scores = np.exp(logits) if score == "softmax" else 1 / (1 + np.exp(-logits))
    probs = scores / scores.sum(-1, keepdims=True)
    if score == "softmax":
        scores = probs
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    assert routing.ids.tolist() == best.tolist()
    chosen = np.take_along_axis(scores, best, -1)
    if router.normalize:
        chosen = chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.weights.detach(), chosen, rtol=2e-5)
    np.testing.assert_allclose(routing.probs.detach(), probs, rtol=2e-5)
    assert routing.counts.tolist() == np.bincount(best.ravel(), minlength=n_experts).tolist()


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_counts_are_a_histogram(n_tokens, top_k, n_experts, seed):
    ids = np.random.default_rng(seed).integers(0, n_experts, (n_tokens, top_k))
    counts = count_tokens(torch.from_numpy(ids).flatten(), n_experts)
    assert counts.tolist() == np.bincount(ids.ravel(), minlength=n_experts).tolist()
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_ties_still_give_distinct_experts_and_even_weights(moe_config, top_k):
    router = router_of(moe_config, top_k=top_k)
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.randn(6, 16))
    assert all(len(set(row)) == top_k for row in routing.ids.tolist())
    expected = 1 / 4 if top_k == 1 else 1 / top_k
    torch.testing.assert_close(routing.weights, torch.full((6, top_k), expected))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_autocast_and_bf16_inputs_leave_routing_in_float32(moe_config, score):
    router = router_of(moe_config, score=score)
    x = torch.randn(50, 16)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x)
        from_bf16 = router(x.bfloat16())
    for name in ("weights", "probs", "logits"):
        assert getattr(under_autocast, name).dtype == torch.float32
        assert getattr(from_bf16, name).dtype == torch.float32
        assert torch.equal(getattr(under_autocast, name), getattr(plain, name))
    exact = x.bfloat16().double() @ router.weight.double().T
    torch.testing.assert_close(from_bf16.logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_bf16_router_still_scores_in_float32(moe_config):
    router = router_of(moe_config).bfloat16()
    x = torch.randn(50, 16).bfloat16()
    routing = router(x)
    assert routing.logits.dtype == torch.float32
    exact = x.double() @ router.weight.double().T
    torch.testing.assert_close(routing.logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1e-3, 30.0, 3000.0])
def test_extreme_logits_keep_probabilities_and_gradients_finite(moe_config, score, scale):
    router = router_of(moe_config, score=score)
    x = (torch.randn(20, 16) * scale).requires_grad_()
    routing = router(x)
    assert routing.weights.isfinite().all() and routing.probs.isfinite().all()
    assert (routing.probs.sum(-1) <= 1 + 1e-5).all()
    gradient = torch.autograd.grad(routing.weights.square().sum() + routing.probs[0, 0], x)[0]
    assert gradient.isfinite().all()


def test_a_whole_layer_moves_its_bias_with_it_and_keeps_it_float32(moe_config):
    moe = MoE(moe_config(moe={"score": "sigmoid", "bias_update_rate": 0.1}))
    moe.router.expert_bias.copy_(torch.tensor([0.1, -0.3, 1e-4, 0.7]))
    before = moe.router.expert_bias.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        moe.to(dtype)
        assert moe.router.weight.dtype == dtype
        assert torch.equal(moe.router.expert_bias, before)
        assert moe.router.expert_bias.dtype == torch.float32
    assert moe.to("meta").router.expert_bias.device.type == "meta"
