"""Published models, counted: from our decoder's own modules where it can be that model.

The decoder is built on PyTorch's meta device, where weights have shapes and no memory, so a model
of a trillion parameters is counted in a second. What it cannot be is counted by formula, from the
list of its weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nano_moe.accounting import (
    BYTES,
    Sparsity,
    WeightGroup,
    kv_cache_numbers,
    parameters,
    params_by_kind,
    sparsity,
    stored_bytes,
    weight_groups,
)
from nano_moe.config import ModelConfig
from nano_moe.errors import UserError
from nano_moe.model.experts import Experts
from nano_moe.model.gpt import GPT
from nano_moe.published import Published


class Census(NamedTuple):
    """What a published model holds; the field names are keys of `count --json`."""

    by: str  # "built" or "formula"
    total_params: int
    active_params: int
    params_by_kind: dict[str, int]
    active_by_kind: dict[str, int]
    weight_bytes: dict[str, float]  # by precision
    active_bytes: dict[str, float]
    kv_cache_bytes_per_token: int | None  # in bf16; None where the model is a list of weights
    sparsity: Sparsity | None  # None in a dense model


def census(published: Published) -> Census:
    """Count a published model; what is built must equal the formula to the last weight."""
    groups, by, cached = _weights(published), "formula", None
    total, active = parameters(groups)
    if published.model is not None:
        by, cached = "built", BYTES["bf16"] * kv_cache_numbers(published.model)
        built = count_built(published.model)
        assert built == (total, active), f"built are {built}, by formula {total, active}"
    n_experts = published.experts_per_layer
    return Census(
        by=by,
        total_params=total,
        active_params=active,
        params_by_kind=params_by_kind(groups),
        active_by_kind=params_by_kind(groups, active=True),
        weight_bytes=stored_bytes(total),
        active_bytes=stored_bytes(active),
        kv_cache_bytes_per_token=cached,
        sparsity=None if n_experts is None else sparsity(groups, n_experts),
    )


def count_built(model: ModelConfig) -> tuple[int, int]:
    """All parameters of the built decoder, and those of one token: top_k / n_experts of experts."""
    try:
        with torch.device("meta"):
            decoder = GPT(model)
    except RuntimeError as error:
        raise UserError("model: weights of these sizes have no address; lower its sizes") from error
    total = sum(p.numel() for p in decoder.parameters())
    if model.moe is None:
        return total, total
    stacks = [module for module in decoder.modules() if isinstance(module, Experts)]
    experts = sum(p.numel() for stack in stacks for p in stack.parameters())
    return total, total - experts + experts * model.moe.top_k // model.moe.n_experts


def _weights(published: Published) -> list[WeightGroup]:
    if published.model is not None:
        return list(weight_groups(published.model))
    assert published.weights is not None
    return [listing.group() for listing in published.weights]
