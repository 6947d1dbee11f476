"""The sparse layer against brute force, finite differences and the dense FFN it generalises."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from nano_moe.config import MoEConfig
from nano_moe.model.ffn import FFN
from nano_moe.model.moe import MoE

CHOICES = [
    {"score": score, "normalize_top_k": normalize, "top_k": top_k}
    for score in ("softmax", "sigmoid")
    for normalize in (False, True)
    for top_k in (1, 2, 4)
    if not (normalize and top_k == 1)  # refused by the recipe
]
as_id = lambda fields: "-".join(str(value) for value in fields.values())  # noqa: E731


def layer(moe_config, seed: int = 0, **moe) -> MoE:
    """A float64 sparse layer with random weights, and a random selection bias where it has one."""
    torch.manual_seed(seed)
    made = MoE(moe_config(moe=moe)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if made.router.expert_bias is not None:
        made.router.expert_bias.normal_(std=0.3)
    return made


def swiglu_by_hand(gate_up, down, x: list[float]) -> list[float]:
    """down(silu(gate x) * up x), one number at a time."""
    half = len(gate_up) // 2
    products = [sum(w * v for w, v in zip(row, x, strict=True)) for row in gate_up]
    hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(products, products[half:], strict=False)]
    return [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in down]


def moe_by_hand(moe: MoE, config: MoEConfig, x: list[float]) -> list[float]:
    """One token through the layer in plain Python floats."""
    logits = [sum(w * v for w, v in zip(r, x, strict=True)) for r in moe.router.weight.tolist()]
    if config.score == "softmax":
        total = sum(math.exp(z) for z in logits)
        scores = [math.exp(z) / total for z in logits]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    bias = [0.0] * len(scores)
    if moe.router.expert_bias is not None:
        bias = moe.router.expert_bias.tolist()
    ranked = sorted(range(len(scores)), key=lambda e: -(scores[e] + bias[e]))
    chosen = ranked[: config.top_k]
    total = sum(scores[e] for e in chosen) if config.normalizes else 1.0
    outs = [
        (scores[e] / total, moe.experts.gate_up[e].tolist(), moe.experts.down[e].tolist())
        for e in chosen
    ]
    if moe.shared is not None:
        shared = moe.shared
        outs.append((1.0, shared.gate_up.weight.tolist(), shared.down.weight.tolist()))
    parts = [[g * v for v in swiglu_by_hand(gu, d, x)] for g, gu, d in outs]
    return [sum(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    "moe",
    [*CHOICES, {"score": "sigmoid", "bias_update_rate": 0.1}, {"top_k": 1, "n_shared_experts": 1}],
    ids=as_id,
)
def test_every_token_is_the_weighted_sum_of_its_experts(moe_config, moe):
    config = moe_config(moe=moe | {"d_expert": 8})
    made = layer(moe_config, d_expert=8, **moe)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        y, routing = made(x)
    by_hand = [moe_by_hand(made, config.moe, token) for token in x.flatten(0, 1).tolist()]
    torch.testing.assert_close(
        y.flatten(0, 1), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )
    assert routing.counts.sum() == 10 * config.moe.top_k


@pytest.mark.parametrize("moe", CHOICES, ids=as_id)
def test_gradients_equal_finite_differences(moe_config, moe):
    made = layer(moe_config, seed=3, d_expert=8, backend="loop", **moe)
    x = torch.randn(1, 3, 16, dtype=torch.float64)

    def output(router, inputs):
        return functional_call(made, {"router.weight": router}, (inputs,))[0]

    leaves = (made.router.weight.detach().clone().requires_grad_(), x.requires_grad_())
    with torch.no_grad():
        scores = made(x)[1].probs
    gaps = scores.sort(descending=True).values.diff(dim=-1).abs()
    assert gaps.min() > 1e-4, "a tie would make the finite difference jump"
    assert torch.autograd.gradcheck(output, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)
    router_gradient = torch.autograd.grad(output(*leaves).square().sum(), leaves[0])[0]
    assert router_gradient.norm() > 1e-3


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("choice", [{}, {"score": "sigmoid", "normalize_top_k": True}], ids=as_id)
def test_one_expert_is_the_dense_ffn(moe_config, backend, choice):
    torch.manual_seed(0)
    moe = MoE(moe_config(moe={"n_experts": 1, "top_k": 1, "backend": backend, **choice}))
    ffn = FFN(16, 32)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        ffn.gate_up.weight.copy_(moe.experts.gate_up[0])
        ffn.down.weight.copy_(moe.experts.down[0])
    x = torch.randn(3, 12, 16, requires_grad=True)
    sparse, dense = moe(x)[0], ffn(x)[0]
    if backend == "loop":
        assert torch.equal(sparse, dense)
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(sparse.sum(), x)[0],
        torch.autograd.grad(dense.sum(), x)[0],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("n_shared", [1, 2, 3])
def test_the_wide_shared_ffn_is_the_sum_of_the_shared_experts(moe_config, n_shared):
    moe = layer(moe_config, n_shared_experts=n_shared, d_expert=8)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        y = moe(x)[0]
        wide_gate, wide_up = moe.shared.gate_up.weight.chunk(2)
        for i in range(n_shared):
            part = slice(8 * i, 8 * i + 8)
            one = FFN(16, 8).double()
            one.gate_up.weight.copy_(torch.cat([wide_gate[part], wide_up[part]]))
            one.down.weight.copy_(moe.shared.down.weight[:, part])
            y = y - one(x)[0]
        moe.shared = None
        torch.testing.assert_close(y, moe(x)[0], rtol=1e-10, atol=1e-12)


def test_order_of_experts_does_not_matter(moe_config):
    moe, other = layer(moe_config), layer(moe_config)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(dict(moe.named_parameters())[name][order])
        x = torch.randn(2, 6, 16, dtype=torch.float64)
        (y, routing), (permuted, other_routing) = moe(x), other(x)
    torch.testing.assert_close(permuted, y)
    assert torch.equal(other_routing.counts, routing.counts[order])
