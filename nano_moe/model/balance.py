"""Balancing terms and load statistics: pure functions of a layer's routing.

Shapes: N tokens, E experts, K top_k, A values of an attribute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def load_balancing_loss(*, counts: Tensor, probs: Tensor) -> Tensor:
    """E * sum_i f_i P_i of one layer: 1 at even loads, E when one expert takes everything.

    f_i is the share of all N*K assignments that expert i got, so even loads cost 1 for every top_k;
    less than 1 is possible where counts and probabilities disagree. f_i is a count and carries no
    gradient. P_i is the mean full probability of expert i.
    counts (..., E), probs (..., N, E); scalar, the mean over leading dimensions: with one row per
    sequence it is the sequence-wise loss (DeepSeek-V3 2024, eq. 17-20), with the
    counts of a whole step the global-batch loss (Qiu et al. 2025). Fedus et al. 2021
    (Switch), eq. 4-6.
    """
    share = counts.to(probs.dtype) / counts.sum(-1, keepdim=True)
    return counts.shape[-1] * (share.detach() * probs.mean(-2)).sum(-1).mean()


def router_z_loss(*, logits: Tensor) -> Tensor:
    """Mean squared log-partition of the router: keeps logits small. Zoph et al. 2022, eq. 5.

    logits (N, E); scalar.
    """
    return logits.logsumexp(-1).square().mean()


def updated_expert_bias(*, bias: Tensor, counts: Tensor, rate: float, rule: str = "sign") -> Tensor:
    """One step of aux-loss-free balancing: raise starved experts, lower crowded ones, recentre.

    bias (E,) float32, counts (E,) of one whole optimizer step; the new bias. Wang et al. 2024:
    "sign" moves by the rate (algorithm 1), "error" by the rate times (mean - load) / mean
    (sec. 4.3, with the error relative, so that a rate means the same at any batch size).
    Subtracting the mean changes no selection and stops the drift.
    """
    load = counts.to(bias.dtype)
    error = (load.mean() - load) / load.mean().clamp_min(torch.finfo(load.dtype).tiny)
    bias = bias + rate * (error.sign() if rule == "sign" else error)
    return bias - bias.mean()


def load_statistics(counts: Tensor) -> dict[str, Tensor]:
    """How evenly tokens spread over experts: (..., E) counts to (...) figures.

    `max_vio` is MaxVio, (max - mean) / mean (Wang et al. 2024, eq. 4); `load_entropy` is in units
    of log E, 1 when even; `max_share` is the busiest expert's share of all assignments;
    `dead_experts` counts experts without a token.
    """
    load = counts.to(torch.float32)
    total = load.sum(-1).clamp_min(1)
    share = load / total.unsqueeze(-1)
    n_experts = counts.shape[-1]
    log_e = torch.log(torch.tensor(float(max(n_experts, 2))))
    return {
        "max_vio": load.amax(-1) * n_experts / total - 1,
        "load_entropy": torch.special.entr(share).sum(-1) / log_e,
        "max_share": share.amax(-1),
        "dead_experts": (counts == 0).sum(-1).to(torch.float32),
    }


def router_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of a token's router distribution, in units of log E: (N, E) -> scalar."""
    log_e = torch.log(torch.tensor(float(max(probs.shape[-1], 2))))
    return torch.special.entr(probs).sum(-1).mean() / log_e


def mutual_information(joint: Tensor) -> Tensor:
    """What knowing an attribute of a token tells about its expert, in bits.

    joint (..., A, E), how often attribute value a met expert e; (...,): 0 when they are
    independent, the entropy of the load when the attribute decides. Of samples, not of the truth:
    many values with few tokens each raise it.
    """
    p = joint.double() / joint.sum((-2, -1), keepdim=True).clamp_min(1)
    entropies = [torch.special.entr(q).sum(-1) for q in (p.sum(-1), p.sum(-2), p.flatten(-2))]
    return (entropies[0] + entropies[1] - entropies[2]) / math.log(2)
