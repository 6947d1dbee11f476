"""Any combination of schemes that a recipe accepts: backends agree, counts hold, eval is causal.

Shapes: B batch, T time.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nano_moe.accounting import count
from nano_moe.config import MLAConfig, ModelConfig, MoEConfig
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy

LATENT = MLAConfig(
    kv_lora_rank=6, q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10
)
# Each field at its default more often than not, so that most draws are recipes.
MOE = {
    "n_experts": (4, 8, 1),
    "top_k": (2, 1, 3),
    "n_shared_experts": (0, 1),
    "shared_expert_gate": (False, True),
    "first_k_dense": (0, 1),
    "routing": ("token_choice", "hash", "expert_choice"),
    "score": ("softmax", "sigmoid"),
    "normalize_top_k": (None, False),
    "routed_scaling_factor": (1.0, 2.5),
    "per_expert_scale": (False, True),
    "n_groups": (1, 4),
    "top_k_groups": (1, 2),
    "group_score": ("max", "top2_sum"),
    "router_window": (1, 3),
    "train_router": (True, False),
    "noisy_top_k": (False, True),
    "router_jitter": (0.0, 0.2),
    "capacity_factor": (None, 0.5, 1.25),
    "bias_update_rate": (0.0, 0.1),
    "bias_rule": ("sign", "error"),
}
MODEL = {
    "activation": ("swiglu", "gelu"),
    "qk_norm": (False, True),
    "tie_embeddings": (True, False),
}


@st.composite
def models(draw) -> ModelConfig:
    """A tiny sparse model of a few changed fields, if a recipe may say it."""

    def fields(choices: dict) -> dict:
        changed = draw(st.sets(st.sampled_from(sorted(choices)), max_size=6))
        return {name: draw(st.sampled_from(choices[name][1:])) for name in sorted(changed)}

    moe = {"n_experts": 4, "top_k": 2, **fields(MOE)}
    model = {
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": draw(st.sampled_from((16, 20))),
        **fields(MODEL),
    }
    if draw(st.booleans()) and not model.get("qk_norm"):
        model |= {"mla": LATENT, "n_kv_heads": None}
    sizes = {"vocab_size": 50, "context": 8, "n_layers": 2, "d_ff": 48, "init_std": 0.3}
    try:
        return ModelConfig(**sizes, **model, moe=MoEConfig(d_expert=8, **moe))
    except ValidationError:
        reject()


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
