"""Any combination of schemes that a recipe accepts: backends agree, counts hold, eval is causal.

Shapes: B batch, T time.
"""

from __future__ import annotations

import pytest
import torch
from combinations import models
from hypothesis import HealthCheck, assume, given, settings

from nano_moe.accounting import count
from nano_moe.config import ModelConfig
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy


def with_backend(config: ModelConfig, backend: str) -> GPT:
    moe = config.moe.model_copy(update={"backend": backend})
    return init_weights(GPT(config.model_copy(update={"moe": moe})), seed=0)


def batch(n: int = 3) -> torch.Tensor:
    return torch.randint(0, 50, (n, 8), generator=torch.Generator().manual_seed(1))


def trained_on(model: GPT) -> tuple[float, list[torch.Tensor | None]]:
    """Loss of a training pass, and the gradient of every parameter."""
    torch.manual_seed(2)  # of noise and jitter
    loss = cross_entropy(model(batch())[0], batch().roll(-1, 1))
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


combinations = settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])


@combinations
@given(models())
def test_backends_agree_forward_and_backward(config):
    (one, expected), *others = (
        trained_on(with_backend(config, backend)) for backend in ("loop", "grouped", "fused")
    )
    for other, found in others:
        assert_near(one, expected, other, found)


def assert_near(one: float, expected: list, other: float, found: list) -> None:
    """Equal losses and gradients, but for rounding; None where there is no gradient."""
    assert other == pytest.approx(one, rel=1e-5)
    size = torch.stack([grad.norm() for grad in expected if grad is not None]).max()
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert theirs.isfinite().all()
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6 * size


@combinations
@given(config=models())
def test_a_model_is_built_as_it_is_counted(recipe_of, config):
    built = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert count(recipe_of(config)).total_params == built


@combinations
@given(models())
@torch.no_grad()
def test_evaluation_is_repeatable_causal_and_of_each_sequence_alone(config):
    assume(config.is_causal)
    model = with_backend(config, "auto").eval()
    tokens = batch()
    logits = model(tokens)[0]
    assert torch.equal(model(tokens)[0], logits)
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 7) % 50
    torch.testing.assert_close(model(changed)[0][:, :5], logits[:, :5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens[1:2])[0][0], logits[1], rtol=1e-4, atol=1e-4)
