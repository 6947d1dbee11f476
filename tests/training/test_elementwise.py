"""The optimizer's kernels against the same arithmetic in float64, which PyTorch's operators do."""

import pytest
import torch
from torch import nn

from nano_moe.config import OptimConfig
from nano_moe.model.kernels import usable
from nano_moe.training import elementwise
from nano_moe.training.optimizers import MuonAdamW

SHAPES = [(1, 1, 7), (1, 33, 16), (3, 8, 40), (5, 40, 8)]
LIVE = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])  # the second and the last expert rest


def draw(shape, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def both(function, tensors, *arguments):
    """What it returns and what it leaves in its tensors, in float32 and in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        own = [x.to(dtype, copy=True) for x in tensors]
        assert usable(*own) == (dtype == torch.float32)
        results.append((function(*own, *arguments), *own))
    return results


def assert_same(found, expected, rtol=1e-5, atol=1e-6):
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_direction_is_that_of_float64(shape):
    tensors = [*draw(shape, 2), LIVE[: shape[0]]]
    found, expected = both(elementwise.direction, tensors, 0.95, torch.float32)
    assert_same(found, expected)
    norms = found[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(len(norms)))
    rounded, _ = both(elementwise.direction, tensors, 0.95, torch.bfloat16)
    assert rounded[0].dtype == torch.bfloat16
    torch.testing.assert_close(rounded[0], found[0].bfloat16(), rtol=2**-7, atol=1e-6)


def test_a_matrix_of_zeros_has_no_direction():
    zero = torch.zeros(2, 3, 4)
    found = elementwise.direction(zero, zero.clone(), torch.ones(2), 0.9, torch.float32)
    assert not found.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_move_is_that_of_float64(shape, dtype):
    weight, step = draw(shape, 2)
    found, wide, live = weight.clone(), weight.double(), LIVE[: len(weight)]
    elementwise.move(found, step.to(dtype), live, 0.1, 0.01)
    elementwise.move(wide, step.to(dtype).double(), live, 0.1, 0.01)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[live == 0], weight[live == 0])


@pytest.mark.parametrize("shape", SHAPES)
def test_adamws_step_is_that_of_float64(shape):
    weight, grad, average, square = draw(shape, 4)
    live, step = LIVE[: shape[0]], torch.arange(shape[0])
    group = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "lr": 0.01, "weight_decay": 0.1}

    def adamw(weight, grad, average, square, live, step):
        elementwise.adamw(
            weight, grad, elementwise.Moments(average, square, step), group, live=live
        )

    found, expected = both(adamw, [weight, grad, average, square.square(), live, step.float()])
    assert_same(found, expected, rtol=1e-4)
    for now, then in zip(found[1:5], (weight, grad, average, square.square()), strict=True):
        assert torch.equal(now[live == 0], then[live == 0])
    assert not torch.equal(found[1][0], weight[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-45, -1.0, float("nan"), float("-inf")])
def test_one_number_makes_an_expert_live(value, dtype):
    grad = torch.zeros(3, 4, 5, dtype=dtype)
    grad[0, 0, 0], grad[2] = value, -0.0
    grad[1, 3, 4] = value
    if value == 1e-45 and dtype == torch.float32:
        assert grad[0, 0, 0] != 0  # a subnormal number
    assert elementwise.nonzero(grad).tolist() == [1, 1, 0]


def test_the_fused_kernel_of_gpus_does_the_same():
    """PyTorch has it for CPUs, too, which ours do not use."""
    group = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "lr": 0.1, "weight_decay": 0.1}
    weight, grad, average, square = draw((1, 7, 12), 4)
    square = square.abs()
    found, expected = (
        [x.to(dtype, copy=True) for x in (weight, grad, average, square, torch.tensor([3.0]))]
        for dtype in (torch.float32, torch.float64)
    )
    moments = elementwise.Moments(*found[2:])
    elementwise.fused_adamw(found[0], found[1], moments, group)
    wide = elementwise.Moments(*expected[2:])
    elementwise.adamw(expected[0], expected[1], wide, group, live=None)
    assert_same(found, expected)


def test_one_idle_expert_of_a_process_is_left_alone_where_the_fused_kernel_is_used(monkeypatch):
    """Its share of the experts may be one: a stack all the same, which that kernel would move."""
    monkeypatch.setattr(elementwise, "FUSED", {"cpu"})
    alone, matrix = (nn.Parameter(torch.ones(shape)) for shape in ((1, 3, 4), (3, 4)))
    for parameter in (alone, matrix):
        parameter.grad = torch.zeros_like(parameter)
    group = {"params": [alone, matrix], "lr": 0.1, "weight_decay": 0.1, "muon": False}
    MuonAdamW([group], OptimConfig(lr=0.1)).step()
    assert torch.equal(alone, torch.ones(1, 3, 4))
    torch.testing.assert_close(matrix, torch.full((3, 4), 1 - 0.1 * 0.1))  # decay alone
