"""Initial weights: a function of seed, name and shape alone, with the right spread everywhere."""

from __future__ import annotations

import pytest
import torch

from nano_moe.config import MLAConfig
from nano_moe.model.gpt import GPT, init_weights


def named(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_do_not_depend_on_the_global_generator(moe_config):
    config = moe_config(moe={"n_shared_experts": 1, "d_expert": 16})
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model = GPT(config)
        state = torch.get_rng_state()
        drawn.append(named(init_weights(model, seed=0)))
        assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from it either"
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_another_seed_gives_other_weights(moe_config, build):
    one, other = named(build(moe_config(), 0)), named(build(moe_config(), 1))
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert same == {name for name in one if "norm" in name}


def test_no_two_weights_of_a_model_are_drawn_alike(moe_config, build):
    weights = named(build(moe_config(moe={"n_shared_experts": 1, "d_expert": 16}), 0))
    starts = [w.flatten()[:8] / w.flatten()[0] for n, w in weights.items() if "norm" not in n]
    for i, start in enumerate(starts):
        assert not any(torch.allclose(start, other) for other in starts[:i])


@pytest.mark.parametrize(
    "moe", [{}, {"n_experts": 8, "top_k": 1, "d_expert": 64}, {"first_k_dense": 1}], ids=str
)
def test_dense_and_sparse_models_of_a_seed_share_the_rest_bitwise(
    dense_config, moe_config, build, moe
):
    fields = {"qk_norm": True, "tie_embeddings": False}
    dense = named(build(dense_config(**fields), 5))
    sparse = named(build(moe_config(moe=moe, **fields), 5))
    shared = dense.keys() & sparse.keys()
    assert all(torch.equal(dense[name], sparse[name]) for name in shared)
    ffns = {name for name in dense if ".ffn." in name}
    assert shared >= dense.keys() - ffns
    assert shared > {"embedding.weight", "head.weight", "blocks.1.attention.o_proj.weight"}


def test_a_deeper_model_starts_with_the_same_first_layers(moe_config, build):
    shallow, deep = named(build(moe_config(), 0)), named(build(moe_config(n_layers=4), 0))
    residual = ("o_proj.weight", "down")
    for name, weight in shallow.items():
        scale = 2**-0.5 if name.endswith(residual) else 1.0
        torch.testing.assert_close(deep[name], weight * scale)


def test_every_weight_has_its_std_and_norms_are_one(moe_config):
    moe = {"n_shared_experts": 2, "d_expert": 64, "first_k_dense": 1}
    config = moe_config(moe=moe, d_model=64, d_ff=256, n_layers=3, qk_norm=True, init_std=0.05)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    weights = named(init_weights(model, seed=0))
    residual = 0.05 / 6**0.5
    writes_residual = {
        f"blocks.{i}.{part}"
        for i in range(3)
        for part in ("attention.o_proj.weight", "ffn.down.weight", "ffn.experts.down",
                     "ffn.shared.down.weight")
    } & weights.keys()  # fmt: skip
    assert len(writes_residual) == 3 + 1 + 2 + 2
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = residual if name in writes_residual else 0.05
        few = 4 / (2 * weight.numel()) ** 0.5  # four standard errors
        assert weight.std().item() == pytest.approx(std, rel=few), name
        assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5, name
        if weight.ndim == 3:
            per_expert = weight.flatten(1).std(-1)
            assert (per_expert / std - 1).abs().max() < 5 / (2 * weight[0].numel()) ** 0.5
            assert not any(torch.equal(weight[0], other) for other in weight[1:])


def test_scales_start_at_one_and_noise_at_zero_and_all_else_is_drawn(moe_config, build):
    moe = {"noisy_top_k": True, "per_expert_scale": True, "router_window": 2, "d_expert": 64}
    moe |= {"n_shared_experts": 1, "shared_expert_gate": True}
    mla = MLAConfig(
        kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24
    )
    fields = {"d_model": 64, "d_ff": 256, "mla": mla, "n_kv_heads": None, "activation": "gelu"}
    model = build(moe_config(moe=moe, init_std=0.05, **fields))
    for name, weight in named(model).items():
        if "norm" in name or name.endswith("router.scale"):
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("router.noise"):
            assert not weight.any(), name
        else:
            residual = name.endswith(("o_proj.weight", "down", "down.weight"))
            std, few = 0.05 / 2 if residual else 0.05, 4 / (2 * weight.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(std, rel=few), name


def test_initial_loss_is_that_of_a_uniform_guess(moe_config, build):
    torch.manual_seed(0)
    inputs, targets = torch.randint(0, 264, (2, 8, 12))
    logits = build(moe_config(init_std=0.02))(inputs)[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(5.576, abs=0.05)  # ln 264
