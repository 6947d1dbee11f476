"""What a model costs to hold, to train and to decode with, weights as drawn and not trained.

Shapes: B batch, T time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from nano_moe.accounting import count
from nano_moe.bench.bare import BareStep
from nano_moe.bench.recipes import RandomTokens
from nano_moe.config import Recipe
from nano_moe.memory import peak_resident, resident, return_freed_memory
from nano_moe.training.module import Decoder

WARM_UP, STEPS = 1, 3
DECODED = 48  # tokens, each after a prompt of none: weights are read, no cache is


def measure(recipe: Recipe) -> dict[str, Any]:
    """Growth of resident memory in training, and milliseconds per token, trained and decoded.

    Decoding is a forward pass of one token, which reads every weight that it needs once. Medians.
    """
    idle = resident()
    return_freed_memory()
    torch.manual_seed(recipe.seed)
    module = Decoder(recipe)
    decoding = _decode(module, recipe)
    step = BareStep(module, RandomTokens(recipe))
    training = _median(step.run, WARM_UP, STEPS)
    weights = count(recipe).weight_bytes
    return {
        "weights_gb": weights / 1e9,
        "memory_gb": max(peak_resident() - idle, weights) / 1e9,  # it may have held more before
        "train_ms_per_token": 1e3 * training / step.tokens,
        "decode_ms_per_token": 1e3 * decoding,
    }


@torch.no_grad()
def _decode(module: Decoder, recipe: Recipe) -> float:
    tokens = RandomTokens(recipe)(0).flatten()
    module.eval()

    def one(number: int) -> None:
        module.model(tokens[number % len(tokens)].view(1, 1))  # (B, T) = (1, 1)

    seconds = _median(one, WARM_UP, DECODED)
    module.train()
    return seconds


def _median(case: Callable[[int], object], warm_up: int, rounds: int) -> float:
    """Median seconds of the rounds after the warm-up."""
    seconds = []
    for number in range(warm_up + rounds):
        start = time.perf_counter()
        case(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])
