"""What only a CUDA device can show; run by `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch

from nano_moe.model.gpt import GPT, cross_entropy, init_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_loss_in_bf16_on_the_gpu_is_that_of_the_cpu_in_float32(moe_config, tokens):
    model = init_weights(GPT(moe_config()), seed=0)
    exact = cross_entropy(model(tokens)[0], tokens.roll(-1, 1))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        fast = cross_entropy(model.cuda()(tokens.cuda())[0], tokens.cuda().roll(-1, 1))
    assert fast.item() == pytest.approx(exact.item(), rel=2e-2)
