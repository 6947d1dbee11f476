"""Bytes that expert parallelism sends, from a model's fields alone: computed, nothing is measured.

A token goes once to each other rank that holds any of its experts, and one sum comes back; see
`model/expert_parallel.py`. How many ranks that is follows from counting, under one assumption: that
every order of a token's scores is as likely as any other, and nothing is dropped. Trained routers
prefer some experts, and experts that go together may lie together or apart.

Forms: E experts in G groups, K per token from the M best groups, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from nano_moe.accounting import BYTES, FLOAT32_BYTES, sparse_layers, weight_groups
from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.errors import UserError

ID_BYTES, COUNT_BYTES = 4, 8  # an expert's number; how many rows a rank is about to send


class Sent(NamedTuple):
    """What one token costs in one sparse layer, on average."""

    copies: float  # to other ranks, one for each that the token needs
    copies_per_expert: float  # if it went once for each of its experts instead
    forward_bytes: float  # there and back
    backward_bytes: float  # gradients, the same way back and there

    @property
    def bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes


def sent(model: ModelConfig, ranks: int, precision: str, tokens: int) -> Sent:
    """Bytes per token and sparse layer between `ranks`, each with `tokens` at once.

    Rows go out in the precision of matrix products, with K weights in float32 and K numbers of
    experts; sums come back in float32, as the residual stream is. Activation
    checkpointing sends the forward bytes twice. Raises UserError where the experts cannot be shared
    out so, or no formula is known.
    """
    moe = model.moe
    assert moe is not None
    away = (ranks - 1) / ranks  # a token's own rank is as likely as any other
    copies = ranks_needed(moe, ranks) * away
    token, back = model.d_model * BYTES[precision], model.d_model * FLOAT32_BYTES
    weights = moe.top_k * FLOAT32_BYTES
    learned = weights if moe.routing != "hash" or moe.per_expert_scale else 0
    counts = (ranks - 1) * COUNT_BYTES / tokens
    return Sent(
        copies,
        moe.top_k * away,
        copies * (token + weights + moe.top_k * ID_BYTES + back) + counts,
        copies * (token + learned + back),
    )


def ranks_needed(moe: MoEConfig, ranks: int) -> float:
    """How many ranks hold a token's experts, on average; group-limited routing included."""
    limited = moe.top_k_groups < moe.n_groups
    groups = moe.n_groups if limited else moe.n_experts
    _check(moe, ranks, groups, limited)
    limit = moe.top_k_groups if limited else moe.top_k
    per_rank = groups // ranks
    return sum(
        chance * ranks * (1 - math.comb(groups - per_rank, met) / math.comb(groups, met))
        for met, chance in groups_met(moe.n_experts, moe.top_k, groups, limit)
    )


def groups_met(experts: int, top_k: int, groups: int, limit: int) -> Iterator[tuple[int, float]]:
    """(how many groups hold the K chosen experts, how likely): where `limit` may be chosen from.

    The groups whose best expert scores highest are those met first when experts are read from the
    best on. So where the K best lie in no more groups than allowed, they are chosen, and otherwise
    all allowed groups are met: the number is that without a limit, or the limit if that is lower.
    """
    size, all_ways = experts // groups, math.comb(experts, top_k)
    for met in range(1, min(limit, top_k) + 1):
        ways = _ways(size, top_k, groups, met)
        if met == limit:
            ways = all_ways - sum(_ways(size, top_k, groups, fewer) for fewer in range(1, met))
        yield met, ways / all_ways


def _ways(size: int, top_k: int, groups: int, met: int) -> int:
    """Choices of K experts that lie in exactly `met` groups: by inclusion and exclusion."""
    within = (
        (-1) ** (met - some) * math.comb(met, some) * math.comb(some * size, top_k)
        for some in range(1, met + 1)
    )
    return math.comb(groups, met) * sum(within)


def _check(moe: MoEConfig, ranks: int, groups: int, limited: bool) -> None:
    if moe.n_experts % ranks:
        raise UserError(
            f"model.moe.n_experts={moe.n_experts} cannot be shared out evenly over {ranks} expert "
            "ranks; change one of them"
        )
    if moe.routing == "expert_choice":
        raise UserError("model.moe.routing: expert_choice is not for expert parallelism")
    if limited and (moe.group_score != "max" or groups % ranks):
        raise UserError(
            f"model.moe.n_groups={moe.n_groups}: how many of {ranks} ranks a token needs is known "
            "where a rank holds whole groups and group_score is max; change one of them"
        )


def train_flops_of_weights(model: ModelConfig) -> int:
    """FLOPs of a token's products with weights, forward and backward; attention's own left out."""
    return 3 * sum(2 * group.size * group.products for group in weight_groups(model))


def expert_flops(model: ModelConfig) -> float:
    """FLOPs of a token with its routed experts in one sparse layer, forward and backward."""
    products = (2 * g.size * g.products for g in weight_groups(model) if g.kind == "experts")
    return 3 * sum(products) / sparse_layers(model)


class Link(NamedTuple):
    """A connection and the bandwidth that its makers state, per direction."""

    name: str
    bytes_per_second: float


LINKS = (
    Link("PCIe 4.0 x16", 31.5e9),  # 16 lanes of 16 GT/s, 128b/130b
    Link("NVLink 4", 450e9),  # an H100's 18 links: 900 GB/s, half of it each way
    Link("InfiniBand 100 Gb/s", 12.5e9),
    Link("InfiniBand 400 Gb/s", 50e9),
)


def seconds_at_least(total_bytes: float, link: Link) -> float:
    """Bytes over the stated bandwidth: a lower bound, without latency, headers or congestion."""
    return total_bytes / link.bytes_per_second
