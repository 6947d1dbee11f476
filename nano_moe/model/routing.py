"""Routing: which experts a token visits, and with what weight; pure functions of scores.

Shapes: B sequences, T time, N = B*T tokens, E experts, K top_k, G groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nano_moe.model import kernels, one_pass


class Routing(NamedTuple):
    """What one sparse layer decided for N tokens; everything at least float32.

    Where experts choose, K is E and `kept` holds the choice.
    """

    ids: Tensor  # (N, K) int64, the chosen experts, best first
    weights: Tensor  # (N, K), what each expert's output is multiplied by
    probs: Tensor  # (N, E), scores over all experts, summing to 1 per token
    logits: Tensor  # (N, E)
    counts: Tensor  # (E,) int64, tokens that chose each expert, before any are dropped
    kept: Tensor | None = None  # (N, K) bool, assignments that are carried out; None: all


def scores_of(logits: Tensor, kind: str) -> Tensor:
    """Router logits to scores in [0, 1]: (N, E) -> (N, E)."""
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def probabilities_of(scores: Tensor, kind: str) -> Tensor:
    """Scores to a distribution over experts: (N, E) -> (N, E). Softmax scores are one already.

    The floor only guards 0/0; a larger one would let the router lower the balancing loss by
    shrinking all its scores.
    """
    if kind == "softmax":
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def best_experts(scores: Tensor, top_k: int) -> Tensor:
    """The experts of the largest scores, best first: (N, E) -> (N, K) int64."""
    if not kernels.usable(scores, dtypes=kernels.FLOAT32):
        return scores.topk(top_k, dim=-1).indices
    return one_pass.largest(scores, top_k)


def gate_weights(chosen: Tensor, normalize: bool) -> Tensor:
    """Weights of the chosen experts from their scores: (N, K) -> (N, K)."""
    if not normalize:
        return chosen
    return chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def count_tokens(ids: Tensor, n_experts: int) -> Tensor:
    """Tokens per expert without a data-dependent shape: (..., M) ids -> (..., E) counts."""
    counts = torch.zeros(*ids.shape[:-1], n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(-1, ids, torch.ones_like(ids))


def limit_to_groups(selection: Tensor, n_groups: int, top_k: int, score: str) -> Tensor:
    """Put experts outside of a token's best `top_k` groups at -inf: (N, E) -> (N, E).

    A group scores as its best expert ("max", DeepSeek-V2, sec. 2.2.2) or its best two
    ("top2_sum", DeepSeek-V3, sec. 2.1.2). A mask of 0 would let a masked expert win against
    experts whose biased scores are negative.
    """
    grouped = selection.unflatten(-1, (n_groups, -1))  # (N, G, E/G)
    best = grouped.topk(1 if score == "max" else 2, dim=-1).values.sum(-1)  # (N, G)
    allowed = torch.zeros_like(best, dtype=torch.bool)
    allowed = allowed.scatter(-1, best.topk(top_k, dim=-1).indices, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -math.inf).flatten(-2)


def experts_choose(scores: Tensor, capacity: int) -> Tensor:
    """Each expert takes its `capacity` highest-scoring tokens: (N, E) -> (N, E) bool.

    Whether a token is taken depends on the tokens after it. Zhou et al. 2022, sec. 3.2.
    """
    taken = scores.topk(capacity, dim=0).indices  # (C, E)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, taken, True)


def drop_overflow(routing: Routing, n_sequences: int, capacity_factor: float) -> Routing:
    """Let each expert take at most ceil(factor * K * T / E) assignments of each sequence.

    First choices queue in order of position, then second choices, and so on; those past the
    capacity are not carried out, and such a token goes by on the residual stream. A second choice
    therefore depends on the first choices of later tokens: not causal. GShard (Lepikhin et al.
    2020, algorithm 1) and Switch (Fedus et al. 2021, eq. 3).
    """
    n_tokens, top_k = routing.ids.shape
    n_experts, length = routing.counts.shape[0], n_tokens // n_sequences
    room = capacity_factor * top_k * length / n_experts
    capacity = math.ceil(round(room, 6))  # 1.1 * 100 in floats is above 110
    queues = routing.ids.view(n_sequences, length, top_k).mT.flatten(1)  # (B, K*T)
    order = queues.argsort(dim=-1, stable=True)
    counts = count_tokens(queues, n_experts)  # (B, E)
    starts = counts.cumsum(-1) - counts
    places = torch.arange(length * top_k, device=order.device).expand_as(order)
    rank = places - starts.gather(-1, queues.gather(-1, order))  # within an expert, as sorted
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, rank < capacity)
    return routing._replace(kept=kept.view(n_sequences, top_k, length).mT.reshape(-1, top_k))


def carried_out(routing: Routing) -> tuple[Tensor, Tensor]:
    """Expert of each assignment (N*K,), E for a dropped one, and how many each gets (E,)."""
    if routing.kept is None:
        return routing.ids.flatten(), routing.counts
    n_experts = len(routing.counts)
    ids = routing.ids.masked_fill(~routing.kept, n_experts).flatten()
    return ids, count_tokens(ids, n_experts + 1)[:-1]


def dropped_share(routing: Routing) -> Tensor:
    """Share of assignments that were not carried out, a scalar."""
    if routing.kept is None:
        return torch.zeros((), device=routing.ids.device)
    return 1 - routing.kept.float().mean()


def hash_table(vocab_size: int, n_experts: int, top_k: int, layer: int) -> Tensor:
    """K distinct experts per token id, drawn once and for all: (V, K) int64.

    Roller et al. 2021 (Hash Layers), random hash; each layer has a hash of its own, the same in
    every run.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(vocab_size, top_k, dtype=torch.int64)
    generator = torch.Generator().manual_seed(layer)
    draws = torch.rand(vocab_size, n_experts, generator=generator, device="cpu")
    return draws.topk(top_k, dim=-1).indices
