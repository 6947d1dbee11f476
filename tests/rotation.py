"""What the tests of both attentions share: random float64 weights, and RoPE by complex numbers.

Shapes: T time, C width of what is turned.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from nano_moe.config import ModelConfig
from nano_moe.model.attention import rope_tables


def randomized(attention: nn.Module, config: ModelConfig) -> tuple[nn.Module, tuple]:
    """The attention in float64 with random weights (norms too), and its rotary tables."""
    attention = attention.double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    cos, sin = rope_tables(config.context, config.rope_size, config.rope_theta)
    return attention, (cos.double(), sin.double())


def turned(vector: np.ndarray, position: int, theta: float) -> np.ndarray:
    """RoPE as complex numbers: component i and i + C/2 are one number, turned by an angle."""
    half = len(vector) // 2
    numbers = vector[:half] + 1j * vector[half:]
    numbers = numbers * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([numbers.real, numbers.imag])
