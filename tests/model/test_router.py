"""Routers: their contract, full precision, and each way of choosing against plain Python.

Shapes: B sequences, T time, N = B*T tokens, D d_model, E experts, K top_k.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.config import OptimConfig
from nano_moe.model.loss import cross_entropy
from nano_moe.model.moe import MoE
from nano_moe.model.ops import at_least_float32
from nano_moe.model.router import ExpertChoiceRouter, HashRouter, Router, make_router
from nano_moe.training.optimizers import MuonAdamW, parameter_groups

ROUTINGS = ("token_choice", "expert_choice", "hash")


def router_of(moe_config, layer: int = 0, **moe) -> Router | HashRouter:
    """A router with random weights, not in training."""
    torch.manual_seed(0)
    router = make_router(moe_config(moe={"d_expert": 8, **moe}), layer).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


# The contract


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


@pytest.mark.parametrize("routing", ROUTINGS)
@given(
    st.integers(1, 8).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_counts_and_probabilities_of_every_routing_agree(
    moe_config, routing, sizes, n_sequences, length
):
    n_experts, top_k = sizes
    router = router_of(moe_config, routing=routing, n_experts=n_experts, top_k=top_k)
    tokens = torch.randint(0, 264, (n_sequences, length))
    made = router(torch.randn(n_sequences, length, 16), tokens)
    chosen = made.ids.flatten() if made.kept is None else made.ids[made.kept]
    assert made.counts.tolist() == torch.bincount(chosen, minlength=n_experts).tolist()
    assert all(len(set(row)) == len(row) for row in made.ids.tolist())
    torch.testing.assert_close(made.probs.sum(-1), torch.ones(n_sequences * length))
    assert made.logits.shape == made.probs.shape == (n_sequences * length, n_experts)
    if routing != "expert_choice":
        assert made.ids.shape == made.weights.shape == (n_sequences * length, top_k)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_factor_and_each_experts_scale_multiply_the_weights(moe_config, tokens, routing):
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
    plain = router_of(moe_config, routing=routing)
    scaled = router_of(
        moe_config, routing=routing, routed_scaling_factor=2.5, per_expert_scale=True
    )
    scaled.load_state_dict({**plain.state_dict(), "scale": torch.tensor([0.5, -1.0, 3.0, 0.0])})
    one, other = plain(x, tokens), scaled(x, tokens)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.probs, other.probs)
    for weights, ids, before in zip(
        other.weights.tolist(), other.ids.tolist(), one.weights.tolist(), strict=True
    ):
        by_hand = [
            2.5 * (0.5, -1.0, 3.0, 0.0)[e] * weight for e, weight in zip(ids, before, strict=True)
        ]
        assert weights == pytest.approx(by_hand, rel=1e-6)


# Noise and jitter: in training only


def test_noise_is_gaussian_with_a_learned_spread_per_expert(moe_config):
    n_draws = 20_000
    router = router_of(moe_config, noisy_top_k=True)
    x = torch.randn(16) / 4
    spread = torch.log1p(torch.exp(router.noise @ x))  # softplus
    assert spread.max() > 1.5 * spread.min(), "the spread does differ between experts"
    clean = router.logits(x.view(1, 1, 16))
    noisy = router.train().logits(x.expand(1, n_draws, 16))
    noise = ((noisy - clean) / spread).detach().double().numpy()
    limit = 4.5 / n_draws**0.5  # standard errors of a mean
    np.testing.assert_allclose(noise.mean(0), 0, atol=limit)
    np.testing.assert_allclose(noise.std(0), 1, atol=limit / 2**0.5)
    for width in (0.5, 1.0, 2.0):
        inside = math.erf(width / 2**0.5)
        np.testing.assert_allclose((np.abs(noise) < width).mean(0), inside, atol=limit / 2)
    assert np.abs(np.corrcoef(noise.T) - np.eye(4)).max() < limit, "each expert has its own"


def test_new_noise_weights_spread_by_softplus_of_zero(moe_config, build):
    router = build(moe_config(moe={"noisy_top_k": True})).routers[0]
    x = torch.randn(1, 20_000, 16)
    noise = router.train().logits(x) - router.eval().logits(x)
    assert noise.std().item() == pytest.approx(math.log(2), rel=0.02)


def test_jitter_scales_the_routers_input_uniformly(moe_config):
    jitter, n_draws = 0.3, 20_000
    router = router_of(moe_config, n_experts=16, router_jitter=jitter).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))  # so that logits are what the router sees
    factors = router.logits(torch.ones(1, n_draws, 16)).detach()
    assert 1 - jitter <= factors.min() < 1 - 0.99 * jitter
    assert 1 + 0.99 * jitter < factors.max() <= 1 + jitter
    deciles = torch.histc(factors, 10, 1 - jitter, 1 + jitter) / factors.numel()
    torch.testing.assert_close(deciles, torch.full((10,), 0.1), rtol=0, atol=0.003)
    assert (torch.corrcoef(factors.T) - torch.eye(16)).abs().max() < 0.04, "a draw per element"


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_noise_and_jitter_are_for_training_only(moe_config, routing):
    fields = {"noisy_top_k": True, "router_jitter": 0.5}
    router = router_of(moe_config, routing=routing, **fields)
    plain = router_of(moe_config, routing=routing)
    plain.load_state_dict({"weight": router.weight})
    x = torch.randn(2, 12, 16)
    for now, again, without in zip(router(x), router(x), plain(x), strict=True):
        if now is not None:
            assert torch.equal(now, again) and torch.equal(now, without)
    for name in fields:
        router = router_of(moe_config, routing=routing, **{name: fields[name]}).train()
        assert (router(x).logits - router(x).logits).abs().min() > 0


# Groups


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k_groups", [1, 2])
def test_chosen_experts_lie_in_the_best_groups(moe_config, group_score, biased, top_k_groups):
    router = router_of(
        moe_config,
        n_experts=12,
        top_k=3,
        n_groups=4,
        top_k_groups=top_k_groups,
        group_score=group_score,
        score="sigmoid",
        bias_update_rate=0.1 if biased else 0.0,
    )
    if biased:
        router.expert_bias.uniform_(-3, -1)  # below every score: all selection scores negative
    routing = router(torch.randn(4, 12, 16))
    selection = routing.logits.sigmoid() + (router.expert_bias if biased else 0)
    best = 1 if group_score == "max" else 2
    for row, ids in zip(selection.tolist(), routing.ids.tolist(), strict=True):
        groups = [sorted(row[3 * g : 3 * g + 3], reverse=True) for g in range(4)]
        ranked = sorted(range(4), key=lambda g: -sum(groups[g][:best]))[:top_k_groups]
        allowed = [e for e in range(12) if e // 3 in ranked]
        assert ids == sorted(allowed, key=lambda e: -row[e])[:3]
    scores = routing.logits.sigmoid().gather(-1, routing.ids)
    torch.testing.assert_close(routing.weights, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("n_groups", [2, 4])
def test_all_groups_choose_as_no_groups(moe_config, n_groups):
    x = torch.randn(2, 12, 16)
    fields = {"n_experts": 8, "top_k": 3}
    plain = router_of(moe_config, **fields)(x)
    in_groups = router_of(moe_config, n_groups=n_groups, top_k_groups=n_groups, **fields)(x)
    assert torch.equal(in_groups.ids, plain.ids)
    assert torch.equal(in_groups.weights, plain.weights)


# Experts choose


@given(
    st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    st.sampled_from(("softmax", "sigmoid")),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_each_expert_takes_its_share_of_the_best_tokens(
    moe_config, sizes, score, n_sequences, length
):
    n_experts, top_k = sizes
    router = router_of(
        moe_config, routing="expert_choice", n_experts=n_experts, top_k=top_k, score=score
    )
    assert isinstance(router, ExpertChoiceRouter)
    routing = router(torch.randn(n_sequences, length, 16))
    capacity = max(1, n_sequences * length * top_k // n_experts)
    assert routing.counts.tolist() == [capacity] * n_experts
    logits = routing.logits.detach()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    assert routing.ids.tolist() == [list(range(n_experts))] * (n_sequences * length)
    torch.testing.assert_close(routing.weights.detach(), scores)
    for expert, column in enumerate(scores.T.tolist()):
        taken = routing.kept[:, expert].nonzero().flatten().tolist()
        best = sorted(range(len(column)), key=lambda token: -column[token])[:capacity]
        assert set(taken) == set(best)


# Hashes


def test_a_hash_router_looks_at_the_tokens_id_alone(moe_config):
    router = router_of(moe_config, routing="hash", n_experts=8, d_expert=8)
    assert not list(router.parameters())
    tokens = torch.tensor([[5, 9, 5, 200], [9, 5, 5, 9]])
    first, second = (router(torch.randn(2, 4, 16), tokens) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.weights, second.weights)
    by_token = {}
    for token, ids in zip(tokens.flatten().tolist(), first.ids.tolist(), strict=True):
        assert by_token.setdefault(token, ids) == ids
    torch.testing.assert_close(first.weights, torch.full((8, 2), 0.5))
    expected = F.one_hot(first.ids, 8).sum(1) / 2
    torch.testing.assert_close(first.probs, expected)


def test_each_layer_of_a_model_hashes_in_its_own_way(moe_config, build):
    tables = [r.table for r in build(moe_config(moe={"routing": "hash"}, n_layers=4)).routers]
    assert not any(torch.equal(tables[i], tables[j]) for i in range(4) for j in range(i))


def test_a_saved_hash_routes_as_before(moe_config, tokens):
    x = torch.zeros(2, 12, 16)
    saved, fresh = (router_of(moe_config, layer=layer, routing="hash") for layer in (3, 0))
    assert not torch.equal(fresh(x, tokens).ids, saved(x, tokens).ids)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(x, tokens).ids, saved(x, tokens).ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_hash_router_still_hashes(moe_config, tokens, dtype):
    router = router_of(moe_config, routing="hash", per_expert_scale=True)
    before = router(torch.zeros(2, 12, 16), tokens)
    after = router.to(dtype)(torch.zeros(2, 12, 16, dtype=dtype), tokens)
    assert torch.equal(before.ids, after.ids)
    assert after.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# A window of positions


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_logits_depend_on_exactly_the_last_positions_of_their_sequence(moe_config, window):
    router = router_of(moe_config, router_window=window)
    x = torch.randn(2, 6, 16)
    jacobian = torch.autograd.functional.jacobian(router.logits, x).view(2, 6, 4, 2, 6, 16)
    for b, t, c, s in np.ndindex(2, 6, 2, 6):
        inside = b == c and t - window < s <= t
        part = jacobian[b, t, :, c, s]
        assert part.all() if inside else not part.any(), (b, t, c, s)


def test_a_windows_logits_equal_their_sum(moe_config):
    router = router_of(moe_config, router_window=3)
    x = torch.randn(2, 5, 16)
    newest, previous, oldest = (part.tolist() for part in router.weight.double().chunk(3, dim=-1))
    dot = lambda a, b: sum(u * v for u, v in zip(a, b, strict=True))  # noqa: E731
    logits = router.logits(x).view(2, 5, 4)
    for b, t, e in np.ndindex(2, 5, 4):
        rows = x[b].double().tolist()
        by_hand = dot(newest[e], rows[t])
        by_hand += dot(previous[e], rows[t - 1]) if t >= 1 else 0
        by_hand += dot(oldest[e], rows[t - 2]) if t >= 2 else 0
        assert logits[b, t, e].item() == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


def test_a_window_that_weighs_the_past_by_zero_is_the_plain_router(moe_config):
    plain, wide = router_of(moe_config), router_of(moe_config, router_window=4)
    with torch.no_grad():
        wide.weight.zero_()[:, :16] = plain.weight
    x = torch.randn(2, 12, 16)
    assert torch.equal(plain(x).ids, wide(x).ids)
    torch.testing.assert_close(plain(x).logits, wide(x).logits)


# A frozen router


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("train_router", [True, False])
def test_a_frozen_router_stays_while_everything_else_moves(
    moe_config, build, tokens, name, train_router
):
    model = build(moe_config(moe={"train_router": train_router}))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    config = OptimConfig(name=name, lr=0.01)
    cross_entropy(model(tokens)[0], tokens.roll(-1, 1)).backward()
    MuonAdamW(parameter_groups(model, config), config).step()
    for key, parameter in model.named_parameters():
        frozen = "router" in key and not train_router
        assert (parameter.grad is None) == frozen, key
        assert torch.equal(parameter, before[key]) == frozen, key


def test_gradients_go_through_a_frozen_router_to_its_input(moe_config):
    router = router_of(moe_config, train_router=False)
    x = torch.randn(1, 5, 16, requires_grad=True)
    assert torch.autograd.grad(router(x).weights.square().sum(), x)[0].abs().min() > 0
