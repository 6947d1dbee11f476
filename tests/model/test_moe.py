"""The sparse layer against brute force, finite differences and the dense FFN it generalises."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.func import functional_call

from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.model.ffn import FFN
from nano_moe.model.moe import MoE

CHOICES = [
    {"score": score, "normalize_top_k": normalize, "top_k": top_k}
    for score in ("softmax", "sigmoid")
    for normalize in (False, True)
    for top_k in (1, 2, 4)
    if not (normalize and top_k == 1)  # refused by the recipe
]
BIASED = {"bias_update_rate": 0.1, "bias_rule": "error"}
SCALED = {"per_expert_scale": True, "routed_scaling_factor": 2.5}
GATED = {"n_shared_experts": 2, "shared_expert_gate": True}
as_id = lambda fields: "-".join(str(value) for value in fields.values())  # noqa: E731


def in_groups(top_k: int, group_score: str = "max") -> dict:
    """Two groups of two experts, as few of them as hold top_k."""
    return {"n_groups": 2, "top_k_groups": math.ceil(top_k / 2), "group_score": group_score}


def layer(moe_config, seed: int = 0, model=None, **moe) -> MoE:
    """A float64 sparse layer with random weights, and a random selection bias where it has one."""
    torch.manual_seed(seed)
    made = MoE(moe_config(moe={"d_expert": 8, **moe}, **(model or {}))).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if getattr(made.router, "expert_bias", None) is not None:
        made.router.expert_bias.normal_(std=0.3)
    return made


def ffn_by_hand(first, down, x: list[float], activation: str) -> list[float]:
    """down(silu(gate x) * up x) or down(gelu(up x)), one number at a time."""
    products = [dot(row, x) for row in first]
    if activation == "gelu":
        hidden = [u * (1 + math.erf(u / 2**0.5)) / 2 for u in products]
    else:
        pairs = zip(products, products[len(first) // 2 :], strict=False)
        hidden = [g / (1 + math.exp(-g)) * u for g, u in pairs]
    return [dot(row, hidden) for row in down]


def dot(a: list[float], b: list[float]) -> float:
    return sum(u * v for u, v in zip(a, b, strict=True))


def choose_by_hand(selection: list[float], config: MoEConfig) -> list[int]:
    """The best top_k experts of the best groups."""
    size, best = config.n_experts // config.n_groups, 1 if config.group_score == "max" else 2
    groups = [
        sorted(selection[size * g : size * (g + 1)], reverse=True) for g in range(config.n_groups)
    ]
    ranked = sorted(range(len(groups)), key=lambda g: -sum(groups[g][:best]))
    allowed = [e for e in range(config.n_experts) if e // size in ranked[: config.top_k_groups]]
    return sorted(allowed, key=lambda e: -selection[e])[: config.top_k]


def weights_by_hand(router, config: MoEConfig, x: list[float]) -> dict[int, float]:
    """Chosen experts and their weights, for one token."""
    logits = [dot(row, x) for row in router.weight.tolist()]
    if config.score == "softmax":
        total = sum(math.exp(z) for z in logits)
        scores = [math.exp(z) / total for z in logits]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    bias = [0.0] * len(scores) if router.expert_bias is None else router.expert_bias.tolist()
    scale = [1.0] * len(scores) if router.scale is None else router.scale.tolist()
    chosen = choose_by_hand([s + b for s, b in zip(scores, bias, strict=True)], config)
    total = sum(scores[e] for e in chosen) if config.normalizes else 1.0
    return {e: config.routed_scaling_factor * scale[e] * scores[e] / total for e in chosen}


def moe_by_hand(moe: MoE, config: ModelConfig, x: list[float]) -> list[float]:
    """One token through the layer in plain Python floats."""
    name = "gate_up" if config.activation == "swiglu" else "up"
    first, down = moe.experts.get_parameter(name).tolist(), moe.experts.down.tolist()
    weights = weights_by_hand(moe.router, config.moe, x)
    outs = [(g, first[e], down[e]) for e, g in weights.items()]
    if moe.shared is not None:
        shared = {key: weight.tolist() for key, weight in moe.shared.named_parameters()}
        gate = 1.0
        if moe.shared_gate is not None:
            gate = 1 / (1 + math.exp(-dot(moe.shared_gate.weight[0].tolist(), x)))
        outs.append((gate, shared[f"{name}.weight"], shared["down.weight"]))
    parts = [[g * v for v in ffn_by_hand(f, d, x, config.activation)] for g, f, d in outs]
    return [sum(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "moe",
    [
        *CHOICES,
        {"score": "sigmoid", **BIASED},
        BIASED,
        SCALED,
        GATED,
        {"top_k": 1, "n_shared_experts": 1},
        in_groups(2),
        in_groups(2, "top2_sum"),
        {"score": "sigmoid", **BIASED, **SCALED, **GATED, **in_groups(1), "top_k": 1},
    ],
    ids=as_id,
)
def test_every_token_is_the_weighted_sum_of_its_experts(moe_config, moe, activation):
    config = moe_config(moe={"d_expert": 8, **moe}, activation=activation)
    made = layer(moe_config, model={"activation": activation}, **moe)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        y, routing = made(x)
    by_hand = [moe_by_hand(made, config, token) for token in x.flatten(0, 1).tolist()]
    torch.testing.assert_close(
        y.flatten(0, 1), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )
    assert routing.counts.sum() == 10 * config.moe.top_k


def differentiable_cases() -> Iterator[dict]:
    """Each choice of experts in the plain layer, and with each thing that may come on top."""
    for choice in CHOICES:
        yield choice
        yield choice | in_groups(choice["top_k"])
        yield choice | in_groups(choice["top_k"], "top2_sum")
        yield choice | {"router_window": 2}
        yield choice | SCALED
        yield choice | BIASED
        yield choice | {"noisy_top_k": True, "router_jitter": 0.3}
        yield choice | {"capacity_factor": 0.5}
    yield GATED
    for score in ("softmax", "sigmoid"):
        for top_k in (1, 2, 4):
            yield {"routing": "expert_choice", "score": score, "top_k": top_k, **SCALED}


@pytest.mark.parametrize("moe", list(differentiable_cases()), ids=as_id)
def test_gradients_equal_finite_differences(moe_config, moe):
    """In training, with the same draw of noise and jitter on every call.

    The plain layer's whole Jacobian, and one random product with it of every other.
    """
    made = layer(moe_config, seed=3, model={"d_model": 8}, backend="loop", **moe)
    names = [name for name, _ in made.named_parameters() if "router" in name or "gate." in name]
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)

    def output(inputs, *parameters):
        torch.manual_seed(0)
        return functional_call(made, dict(zip(names, parameters, strict=True)), (inputs,))

    def same_choice(*leaves):
        y, routing = output(*leaves)
        assert torch.equal(routing.ids, ids), "a step over a tie makes the difference jump"
        assert routing.kept is None or torch.equal(routing.kept, kept)
        return y

    leaves = (x, *(made.get_parameter(name).detach().clone().requires_grad_() for name in names))
    _, (ids, *_, kept) = output(*leaves)
    assert torch.autograd.gradcheck(
        same_choice, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=moe not in CHOICES
    )
    gradients = torch.autograd.grad(same_choice(*leaves).square().sum(), leaves)
    assert all(gradient.norm() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("backend", ["loop", "grouped", "fused"])
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


# Capacity: in training only


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_a_capacity_for_all_tokens_is_no_capacity(moe_config, backend):
    results = []
    for factor in (2.0, None):  # E / K, and dropless
        made = layer(moe_config, capacity_factor=factor, backend=backend).float().train()
        x = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, routing = made(x)
        assert routing.kept is None or routing.kept.all()
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *made.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("n_shared", [0, 1])
def test_a_dropped_token_gets_its_shared_experts_alone(moe_config, backend, n_shared):
    moe = {"capacity_factor": 0.1, "n_shared_experts": n_shared, "backend": backend}
    made = layer(moe_config, **moe).float().train()
    x = torch.randn(2, 12, 16)
    y, routing = made(x)
    dropped = ~routing.kept.any(-1).view(2, 12)
    assert dropped.sum() >= 2 * (12 - 4), "4 experts take one token of each sequence"
    shared = made.shared(x)[0] if n_shared else torch.zeros_like(x)
    assert torch.equal(y[dropped], shared[dropped])
    assert (y - shared)[~dropped].abs().amax(-1).min() > 1e-3
    routed, routing = made.eval()(x)
    assert routing.kept is None
    assert (routed - shared).abs().amax(-1).min() > 1e-3


def test_partly_dropped_tokens_keep_the_weights_of_the_rest(moe_config):
    made = layer(moe_config, capacity_factor=0.75).train()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        y, routing = made(x)
        made.eval()
        without = routing._replace(weights=routing.weights * routing.kept, kept=None)
        assert 0 < routing.kept.sum() < routing.kept.numel()
        torch.testing.assert_close(y[0], made.experts(x[0], without))


# Jitter reaches the router alone


def test_jitter_leaves_the_experts_input_alone(moe_config):
    made = layer(moe_config, router_jitter=0.5, n_shared_experts=1).train()
    seen = []
    for part in (made.experts, made.shared):
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = x.clone()
    made(x)
    assert torch.equal(x, before), "nor is the input written to"
    assert len(seen) == 2 and all(torch.equal(one.view_as(x), before) for one in seen)
