"""The next token of each row: the distribution, and a draw from it.

Kernels, because a token is drawn in less time than PyTorch needs to launch what would sort its
logits. The largest tokens that reach a mass are found without sorting: by bisecting how large the
last of them is.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from nano_moe.errors import UserError
from nano_moe.inference.step_kernels import kernel
from nano_moe.model.kernels import INLINE, array, exp, largest_of

_f32 = np.float32
_PART = 256  # logits among which the largest is sought


def likeliest(logits: Tensor) -> list[int]:
    """The first largest of each row of logits (B, V); raises UserError where one is not finite."""
    tokens = np.empty(len(logits), np.int64)
    _largest.alone(array(logits.float().contiguous()), tokens)
    if (tokens < 0).any():
        raise UserError("the model's logits are not finite; this run diverged, use another")
    return tokens.tolist()


def next_token_probabilities(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Logits (B, V) to the distributions to draw from: temperature, then top-k, then top-p.

    The temperature is above 0. Top-p keeps the smallest set of likeliest tokens whose mass reaches
    `top_p` (Holtzman et al. 2020, eq. 2-3), of equally likely ones the first. (B, V) in float64;
    raises UserError where a logit is not finite.
    """
    largest = np.array(likeliest(logits))
    values = array(logits.float().contiguous())
    weights, chances = np.empty_like(values), np.empty(values.shape)
    kept = min(top_k or len(values[0]), len(values[0]))
    _weigh.alone(values, largest, float(temperature), kept, float(top_p), weights, chances)
    return torch.from_numpy(chances)


def draw(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> list[int]:
    """A token per row of logits (B, V), each by one number of its own generator.

    At temperature 0 the likeliest, without one. Raises UserError where a logit is not finite.
    """
    if temperature == 0:
        return likeliest(logits)
    chances = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    dice = [torch.rand((), generator=g, dtype=torch.float64).item() for g in generators]
    tokens = np.empty(len(logits), np.int64)
    _pick.alone(array(chances), np.array(dice), tokens)
    return tokens.tolist()


# --- kernels -------------------------------------------------------------------------------------


@kernel
def _largest(logits: Any, tokens: Any) -> None:
    """Where the first largest of each row is; -1 where a sum over the row is not finite."""
    for b in range(len(logits)):
        row, total = logits[b], 0.0
        for v in range(len(row)):
            total += row[v]
        tokens[b] = -1
        if abs(total) < np.inf:  # not `isfinite`, whose difference reordering makes 0
            tokens[b] = _first_largest(row)


@njit(**INLINE)
def _first_largest(row: Any) -> Any:
    """Sought within the first part that has the largest."""
    largest, at = -_f32(np.inf), 0
    for start in range(0, len(row), _PART):
        among = largest_of(row[start : start + _PART])
        if among > largest:
            largest, at = among, start
    while row[at] != largest:
        at += 1
    return at


@kernel
def _weigh(
    logits: Any, largest: Any, temperature: Any, top_k: Any, top_p: Any, weights: Any, chances: Any
) -> None:
    """weights: work of float32, (B, V); chances (B, V)."""
    for b in range(len(logits)):
        row, kept, top = logits[b], weights[b], np.float64(logits[b, largest[b]])
        for v in range(len(row)):  # in float64, so that no temperature is too small
            kept[v] = exp(_f32(max((np.float64(row[v]) - top) / temperature, -88.0)))
        if top_k < len(row):
            _keep(kept, np.float64(top_k), True)
        if top_p < 1:
            _keep(kept, top_p * _mass(kept, np.int32(0), False), False)
        total = _mass(kept, np.int32(0), False)
        for v in range(len(row)):
            chances[b, v] = kept[v] / total


@njit(**INLINE)
def _mass(weights: Any, least: Any, counted: Any) -> Any:
    """Of the weights, none negative, whose bits as an integer are `least` or more; or how many."""
    bits, total = weights.view(np.int32), 0.0
    for v in range(len(weights)):
        share = 1.0 if counted else np.float64(weights[v])
        total += share if bits[v] >= least else 0.0
    return total


@njit(**INLINE)
def _keep(weights: Any, need: Any, counted: Any) -> None:
    """Zeroes all but the fewest largest whose mass, or number, is `need`; of equals the first."""
    bits = weights.view(np.int32)
    low, high = np.int32(0), np.int32(bits.max() + 1)
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        if _mass(weights, middle, counted) >= need:
            low = middle
        else:
            high = middle
    mass = _mass(weights, high, counted)
    for v in range(len(weights)):
        if bits[v] < low or (bits[v] == low and mass >= need):
            weights[v] = 0
        elif bits[v] == low:
            mass += 1.0 if counted else np.float64(weights[v])


@kernel
def _pick(chances: Any, dice: Any, tokens: Any) -> None:
    """The token in whose share of [0, 1) the row's number falls."""
    for b in range(len(chances)):
        passed = 0.0
        for v in range(chances.shape[1]):
            if chances[b, v] > 0:
                tokens[b] = v  # the last one where rounding leaves a sum below the number
                passed += chances[b, v]
                if passed > dice[b]:
                    break
