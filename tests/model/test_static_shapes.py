"""No scheme waits for the device or makes a shape depend on data: what a GPU and a compiler need.

Under FakeTensorMode tensors have shapes and no values, so `.item()`, `.tolist()`, `nonzero` or a
boolean index raises.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from nano_moe.model.moe import MoE

SCHEMES = [
    {},
    {"n_groups": 2},
    {"capacity_factor": 0.5},
    {"routing": "expert_choice"},
    {"routing": "hash"},
    {"router_window": 3, "per_expert_scale": True},
    {"noisy_top_k": True, "router_jitter": 0.1},
    {"score": "sigmoid", "bias_update_rate": 0.1},
    {"n_shared_experts": 1, "shared_expert_gate": True, "d_expert": 8},
]
as_id = lambda fields: "-".join(fields) or "plain"  # noqa: E731


def forward_and_backward(moe: MoE, *, bf16: bool = True) -> list[tuple[int, ...]]:
    """Shapes of the output, the input's gradient and the token counts."""
    x = torch.randn(2, 6, 16, requires_grad=True)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y, routing = moe(x, tokens)
    (y * torch.ones_like(y)).sum().backward()
    return [tuple(one.shape) for one in (y, x.grad, routing.counts)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=as_id)
def test_nothing_looks_at_values(moe_config, scheme):
    with FakeTensorMode():
        shapes = forward_and_backward(MoE(moe_config(moe={"backend": "grouped", **scheme})))
    assert shapes == [(2, 6, 16), (2, 6, 16), (4,)]


class ShapesOfGroupedProduct(torch.autograd.Function):
    """The shapes of `grouped_mm`, which has no fake kernel in float32."""

    @staticmethod
    def forward(ctx, rows, weights, offs):
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(len(rows), weights.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        rows, weights = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights), None


@pytest.mark.parametrize("scheme", SCHEMES, ids=as_id)
def test_nothing_looks_at_values_in_float32(moe_config, scheme, monkeypatch):
    monkeypatch.setattr(
        "nano_moe.model.experts.F.grouped_mm",
        lambda rows, weights, offs: ShapesOfGroupedProduct.apply(rows, weights, offs),
    )
    with FakeTensorMode():
        moe = MoE(moe_config(moe={"backend": "grouped", **scheme}))
        shapes = forward_and_backward(moe, bf16=False)
    assert shapes == [(2, 6, 16), (2, 6, 16), (4,)]


def test_the_reference_loop_does(moe_config):
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        forward_and_backward(MoE(moe_config(moe={"backend": "loop"})))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [{}, {"capacity_factor": 0.5}, {"routing": "hash"}], ids=as_id)
def test_a_layer_compiles_into_one_graph(moe_config, scheme):
    torch.manual_seed(0)
    moe = MoE(moe_config(moe={"backend": "grouped", **scheme})).bfloat16()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 16, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.arange(12).view(2, 6)
    y, compiled = moe(x, tokens)[0], torch.compile(moe, fullgraph=True)(x, tokens)[0]
    torch.testing.assert_close(compiled, y, rtol=0.02, atol=0.03)
    direction = torch.randn_like(y)
    pair = [torch.autograd.grad(one, x, direction)[0] for one in (compiled, y)]
    torch.testing.assert_close(*pair, rtol=0.02, atol=0.06)
