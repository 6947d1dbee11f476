"""What the optimizer does to each number, in as few passes over memory as there can be.

On a CPU by kernels of one pass, elsewhere and in float64 by PyTorch's operators; AdamW on a GPU by
PyTorch's fused kernel. A matrix that is not live, an expert without tokens, is left as it is, which
that kernel could not do; it never sees stacked experts.

Shapes: S matrices of m rows and n columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nano_moe.model import kernels

SMALLEST_NORM = 1e-7
FUSED = {"cuda"}  # devices of PyTorch's fused AdamW


def nonzero(grad: Tensor) -> Tensor:
    """1 where a matrix of (S, m, n) holds anything but zeros, else 0: (S,)."""
    if not kernels.usable(grad, dtypes=kernels.FLOAT32):
        return grad.flatten(1).ne(0).any(1).to(grad.dtype)
    found = grad.new_zeros(len(grad))
    kernels.launch(kernels.nonzero, grad.flatten(1), found)
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
    if not kernels.usable(grad, momentum, dtypes=kernels.FLOAT32) or dtype not in kernels.DTYPES:
        momentum.lerp_(grad, live[:, None, None] * (1 - beta))
        ahead = grad.lerp(momentum, beta)
        return (ahead / norms(ahead)).to(dtype)
    squares = grad.new_zeros(grad.shape[:2])
    kernels.launch(kernels.muon_average, grad, momentum, live, beta, squares)
    norm = squares.sum(1).sqrt_().clamp_min_(SMALLEST_NORM)
    ahead = torch.empty_like(grad, dtype=dtype)
    kernels.launch(kernels.muon_ahead, grad, momentum, norm.reciprocal_(), beta, ahead)
    return ahead


def move(weight: Tensor, step: Tensor, live: Tensor, rate: float, decay: float) -> None:
    """weight -= decay * weight + rate * step, (S, m, n), in place."""
    if kernels.usable(weight, dtypes=kernels.FLOAT32) and kernels.usable(step):
        kernels.launch(kernels.muon_move, weight, step, live, rate, decay)
    else:
        weight.sub_(live[:, None, None] * (weight * decay + step.to(weight.dtype) * rate))


class Moments(NamedTuple):
    """AdamW's averages of gradient and squared gradient, and how many steps are in them."""

    average: Tensor  # (S, m, n), written in place
    square: Tensor  # (S, m, n), written in place
    step: Tensor  # (S,)


def adamw(
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    group: Mapping[str, Any],
    *,
    live: Tensor | None,
) -> None:
    """AdamW's step in place, (S, m, n), by the rates of its parameter group.

    `live`, (S,), is 0 for an expert to leave alone; None where all are live.
    """
    if live is None and weight.device.type in FUSED:
        fused_adamw(weight, grad, moments, group)
        return
    live = weight.new_ones(len(weight)) if live is None else live
    names = ("beta1", "beta2", "eps", "lr", "weight_decay")
    beta1, beta2, eps, rate, decay = (group[name] for name in names)
    average, square, step = moments
    steps = step.to(weight.dtype).clamp_min(1)  # float32 after a checkpoint was read
    biases = [1 - beta**steps for beta in (beta1, beta2)]
    if kernels.usable(weight, grad, dtypes=kernels.FLOAT32):
        rates = (beta1, beta2, eps, rate, decay)
        kernels.launch(kernels.adamw, weight, grad, average, square, live, *biases, *rates)
        return
    live, average_bias, square_bias = (x[:, None, None] for x in (live, *biases))
    average.lerp_(grad, live * (1 - beta1))
    square.lerp_(grad.square(), live * (1 - beta2))
    update = average / average_bias / ((square / square_bias).sqrt_().add_(eps))
    weight.sub_(live * update.add_(weight, alpha=decay), alpha=rate)


def fused_adamw(weight: Tensor, grad: Tensor, moments: Moments, group: Mapping[str, Any]) -> None:
    """The same of one live matrix, by PyTorch's kernel of one pass; `step` counts this one."""
    average, square, step = moments
    torch._fused_adamw_(
        [weight], [grad], [average], [square], [], [step.view(())],
        lr=group["lr"], beta1=group["beta1"], beta2=group["beta2"],
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
