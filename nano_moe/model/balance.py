"""Balancing terms and load statistics: pure functions of a layer's routing.

Shapes: N tokens, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(*, counts: Tensor, probs: Tensor) -> Tensor:
    """E * sum_i f_i P_i of one layer: 1 when balanced, E when one expert takes everything.

    f_i is the share of all N*K assignments that expert i got, so the floor is 1 for every top_k;
    it is a count and carries no gradient. P_i is the mean full probability of expert i.
    counts (E,), probs (N, E); scalar. Fedus et al. 2021 (Switch), eq. 4-6.
    """
    share = counts.to(probs.dtype) / counts.sum()
    return counts.shape[0] * (share.detach() * probs.mean(0)).sum()


def router_z_loss(*, logits: Tensor) -> Tensor:
    """Mean squared log-partition of the router: keeps logits small. Zoph et al. 2022, eq. 5.

    logits (N, E); scalar.
    """
    return logits.logsumexp(-1).square().mean()


def updated_expert_bias(*, bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """One step of aux-loss-free balancing: raise starved experts, lower crowded ones, recentre.

    bias (E,) float32, counts (E,) of one whole optimizer step; the new bias. Wang et al. 2024,
    algorithm 1 (sign rule). Subtracting the mean changes no selection and stops the drift.
    """
    load = counts.to(bias.dtype)
    bias = bias + rate * (load.mean() - load).sign()
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
