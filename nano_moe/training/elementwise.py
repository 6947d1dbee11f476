"""What the optimizer does to each number, in as few passes over memory as there can be.

On a CPU by kernels of one pass, elsewhere and in float64 by PyTorch's operators. A matrix that is
not live, an expert without tokens, is left as it is.

Shapes: S matrices of m rows and n columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from nano_moe.model.kernels import Kernel, launch, read, usable, write

SMALLEST_NORM = 1e-7
_f32 = np.float32


def nonzero(grad: Tensor) -> Tensor:
    """1 where a matrix of (S, m, n) holds anything but zeros, else 0: (S,)."""
    if not usable(grad):
        return grad.flatten(1).ne(0).any(1).to(grad.dtype)
    found = grad.new_zeros(len(grad))
    launch(_nonzero, grad.flatten(1), found)
    return found


def norms(matrices: Tensor) -> Tensor:
    """Frobenius norms, not below SMALLEST_NORM: (S, m, n) to (S, 1, 1)."""
    return matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)


def direction(
    grad: Tensor, momentum: Tensor, live: Tensor, beta: float, dtype: torch.dtype
) -> Tensor:
    """Take the gradient into the momentum; Nesterov's direction with norm 1, (S, m, n) in `dtype`.

    Jordan et al. 2024 (Muon).
    """
    if not usable(grad, momentum) or dtype not in (torch.float32, torch.bfloat16):
        momentum.lerp_(grad, live[:, None, None] * (1 - beta))
        ahead = grad.lerp(momentum, beta)
        return (ahead / norms(ahead)).to(dtype)
    squares = grad.new_zeros(grad.shape[:2])
    launch(_average, grad, momentum, live, beta, squares)
    norm = squares.sum(1).sqrt_().clamp_min_(SMALLEST_NORM)
    ahead = torch.empty_like(grad, dtype=dtype)
    launch(_ahead, grad, momentum, norm.reciprocal_(), beta, ahead)
    return ahead


def move(weight: Tensor, step: Tensor, live: Tensor, rate: float, decay: float) -> None:
    """weight -= decay * weight + rate * step, (S, m, n), in place."""
    if usable(weight, step):
        launch(_move, weight, step, live, rate, decay)
    else:
        weight.sub_(live[:, None, None] * (weight * decay + step.to(weight.dtype) * rate))


class Moments(NamedTuple):
    """AdamW's averages of gradient and squared gradient, and how many steps are in them."""

    average: Tensor  # (S, m, n), written in place
    square: Tensor  # (S, m, n), written in place
    step: Tensor  # (S,)


def adamw(
    weight: Tensor, grad: Tensor, moments: Moments, live: Tensor, group: Mapping[str, Any]
) -> None:
    """AdamW's step in place, (S, m, n), by the rates of its parameter group."""
    names = ("beta1", "beta2", "eps", "lr", "weight_decay")
    beta1, beta2, eps, rate, decay = (group[name] for name in names)
    average, square, step = moments
    biases = [1 - beta ** step.clamp_min(1) for beta in (beta1, beta2)]
    if usable(weight, grad):
        rates = (beta1, beta2, eps, rate, decay)
        launch(_adamw, weight, grad, average, square, live, *biases, *rates)
        return
    live, average_bias, square_bias = (x[:, None, None] for x in (live, *biases))
    average.lerp_(grad, live * (1 - beta1))
    square.lerp_(grad.square(), live * (1 - beta2))
    update = average / average_bias / ((square / square_bias).sqrt_().add_(eps))
    weight.sub_(live * update.add_(weight, alpha=decay), alpha=rate)


@Kernel
def _nonzero(values: Any, found: Any) -> None:
    for s in prange(len(values)):
        for j in range(values.shape[1]):
            if values[s, j] != 0:
                found[s] = 1
                break


@Kernel
def _average(grad: Any, momentum: Any, live: Any, beta: Any, squares: Any) -> None:
    """Of live matrices, momentum; of all, each row's sum of squares of the direction."""
    rows = grad.shape[1]
    for r in prange(len(grad) * rows):
        s, i = r // rows, r % rows
        given, average, total = grad[s, i], momentum[s, i], _f32(0)
        weight = (_f32(1) - beta) * live[s]
        for j in range(len(given)):
            value = average[j] + weight * (given[j] - average[j])
            average[j] = value
            ahead = given[j] + beta * (value - given[j])
            total += ahead * ahead
        squares[s, i] = total


@Kernel
def _ahead(grad: Any, momentum: Any, scale: Any, beta: Any, ahead: Any) -> None:
    rows = grad.shape[1]
    for r in prange(len(grad) * rows):
        s, i = r // rows, r % rows
        given, average, out = grad[s, i], momentum[s, i], ahead[s, i]
        for j in range(len(given)):
            write(out, j, (given[j] + beta * (average[j] - given[j])) * scale[s])


@Kernel
def _move(weight: Any, step: Any, live: Any, rate: Any, decay: Any) -> None:
    rows = weight.shape[1]
    for r in prange(len(weight) * rows):
        s, i = r // rows, r % rows
        if live[s] != 0:
            row, by = weight[s, i], step[s, i]
            for j in range(len(row)):
                row[j] -= decay * row[j] + rate * read(by, j)


@Kernel
def _adamw(
    weight: Any,
    grad: Any,
    average: Any,
    square: Any,
    live: Any,
    average_bias: Any,
    square_bias: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    rate: Any,
    decay: Any,
) -> None:
    rows = weight.shape[1]
    for r in prange(len(weight) * rows):
        s, i = r // rows, r % rows
        if live[s] != 0:
            row, given, first, second = weight[s, i], grad[s, i], average[s, i], square[s, i]
            for j in range(len(row)):
                one = first[j] + (_f32(1) - beta1) * (given[j] - first[j])
                two = second[j] + (_f32(1) - beta2) * (given[j] * given[j] - second[j])
                first[j], second[j] = one, two
                step = one / average_bias[s] / (np.sqrt(two / square_bias[s]) + eps)
                row[j] -= rate * (step + decay * row[j])
