"""RMSNorm and SwiGLU against numpy, and the precision RMSNorm keeps inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nano_moe.model.ffn import FFN
from nano_moe.model.ops import RMSNorm


def norm_of(width: int, eps: float = 1e-6) -> RMSNorm:
    norm = RMSNorm(width, eps)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, width))
    return norm


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_equals_numpy(eps):
    norm = norm_of(24, eps).double()
    x = torch.randn(5, 24, dtype=torch.float64) * 3
    rows = x.numpy()
    expected = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps) * np.linspace(0.5, 2, 24)
    # linspace was rounded to float32 once, when the weight was filled
    np.testing.assert_allclose(norm(x).detach(), expected, rtol=1e-6)
    assert norm(x).dtype == torch.float64


def test_rms_norm_squares_and_averages_in_float32():
    """4096 squares summed in bf16 would stop growing at 256 ones; 300 squared overflows fp16."""
    ones = torch.ones(4096, dtype=torch.bfloat16)
    bf16 = RMSNorm(4096, 1e-6)
    torch.nn.init.ones_(bf16.weight)
    torch.manual_seed(0)
    x = torch.randn(8, 4096).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    error = (bf16(x).double() - exact).abs() / exact.abs()
    assert error.max() <= 2**-8, "one rounding to bf16 and no more"
    assert torch.equal(bf16(ones).double(), ones.double())
    fp16 = RMSNorm(8, 1e-6).half()
    torch.nn.init.ones_(fp16.weight)
    assert torch.equal(fp16(torch.full((8,), 300.0).half()), torch.ones(8).half())


def test_swiglu_ffn_equals_numpy_with_gate_rows_first():
    torch.manual_seed(0)
    ffn = FFN(6, 10).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate, up = x.numpy() @ ffn.gate_up.weight.detach().numpy().T.reshape(6, 2, 10).swapaxes(0, 1)
    expected = gate / (1 + np.exp(-gate)) * up @ ffn.down.weight.detach().numpy().T
    y, routing = ffn(x)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-10)
    assert routing is None
