"""A decoder with its experts as a GGUF file of `--quant experts-q8_0` or `experts-q4_0` holds them.

q8_0: blocks of 32 numbers of a row, each an int8 times the block's f16 scale; q4_0: an int4.
"""

from __future__ import annotations

from typing import NamedTuple

import gguf
import torch
from torch import Tensor

from nano_moe.config import ModelConfig
from nano_moe.errors import UserError
from nano_moe.export.gguf_file import (
    EXPERTS_ALONE,
    QUANTS,
    SCALES,
    architecture_of,
    check_experts,
    rounded,
)
from nano_moe.export.tensors import without_training
from nano_moe.model.gpt import GPT

WIDTHS = {"q8_0": "int8", "q4_0": "int4"}
OURS = (".ffn.experts.", ".ffn.shared.")  # in the names of experts' weights


class Stored(NamedTuple):
    """Bytes of weights."""

    experts: int
    all: int


def with_quantized_experts(model: GPT, quant: str) -> GPT:
    """The decoder in eval mode, experts and shared experts rounded as `quant` does, all else fp32.

    A learned factor per expert is in its down-projection, as in the file. Raises UserError for a
    dense model, or rows that are no whole blocks.
    """
    check_experts(model.config)
    scales = _file_scales(model.config)
    config, state = without_training(model.config, model.state_dict(), scales=scales)
    for name, weight in state.items():
        if _is_of_experts(name):
            state[name] = _rounded(weight, quant)
    rounded = GPT(config)
    rounded.load_state_dict(state)
    return rounded.to(model.head.weight.device).eval()


def stored_bytes(model: GPT, quant: str) -> Stored:
    """What the weights take with experts in "fp32" or one of WIDTHS, and all else in fp32."""
    experts = rest = 0
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    for name, weight in model.state_dict().items():
        if _is_of_experts(name):
            experts += weight.nbytes if quant == "fp32" else _n_bytes(weight, quant)
        elif name not in tied:
            rest += weight.nbytes
    return Stored(experts, experts + rest)


def _is_of_experts(name: str) -> bool:
    return any(part in name for part in OURS)


def _file_scales(config: ModelConfig) -> bool:
    """Whether the file leaves the routed factor to llama.cpp; so does a recipe that none holds."""
    try:
        return architecture_of(config) in SCALES
    except UserError:
        return True


def _rounded(weight: Tensor, quant: str) -> Tensor:
    kind, _ = QUANTS[EXPERTS_ALONE + quant]
    blocks = rounded("experts", weight, kind)
    return torch.from_numpy(gguf.dequantize(blocks, kind)).view_as(weight)


def _n_bytes(weight: Tensor, quant: str) -> int:
    numbers, n_bytes = gguf.GGML_QUANT_SIZES[QUANTS[EXPERTS_ALONE + quant][0]]
    return weight.numel() // numbers * n_bytes
