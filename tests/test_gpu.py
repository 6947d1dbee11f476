"""What only a CUDA device can show; run by `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

from nano_moe.config import MLAConfig
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


LATENT = MLAConfig(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)


@pytest.mark.parametrize(
    ("moe", "fields"),
    [
        ({}, {}),
        ({"capacity_factor": 0.5}, {}),  # rows past the last group are left unwritten
        ({"routing": "expert_choice"}, {}),
        ({"routing": "hash"}, {"activation": "gelu"}),
        ({"n_shared_experts": 1, "d_expert": 16}, {"mla": LATENT, "n_kv_heads": None}),
    ],
)
def test_gradients_in_bf16_on_the_gpu_are_near_those_of_the_cpu(moe_config, tokens, moe, fields):
    norms = []
    for device in ("cpu", "cuda"):
        model = init_weights(GPT(moe_config(moe=moe, **fields)), seed=0).to(device)
        inputs = tokens.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            cross_entropy(model(inputs)[0], inputs.roll(-1, 1)).backward()
        norms.append(torch.stack([p.grad.norm().cpu() for p in model.parameters()]))
    torch.testing.assert_close(norms[1], norms[0], rtol=0.2, atol=0.02)


def test_the_loss_in_bf16_on_the_gpu_is_that_of_the_cpu_in_float32(moe_config, tokens):
    model = init_weights(GPT(moe_config()), seed=0)
    exact = cross_entropy(model(tokens)[0], tokens.roll(-1, 1))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        fast = cross_entropy(model.cuda()(tokens.cuda())[0], tokens.cuda().roll(-1, 1))
    assert fast.item() == pytest.approx(exact.item(), rel=2e-2)
