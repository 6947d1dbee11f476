"""Cross-entropy, bits per byte and routing statistics of a model over a whole validation split.

Deterministic: every token of the split is predicted once, in non-overlapping windows, no sampling.
Cross-entropy alone: no balancing term enters any figure here. No Lightning.

Shapes: B batch, T time, L sparse layers, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_moe.model.balance import load_statistics, router_entropy
from nano_moe.model.gpt import GPT, cross_entropy
from nano_moe.text.store import Corpus
from nano_moe.text.windows import EvalWindows


@dataclass(frozen=True)
class Score:
    """Prediction quality over some text: nats summed over `tokens`, which spell `n_bytes`."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def ce(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per UTF-8 byte: comparable across tokenizers."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    def as_json(self) -> dict[str, float]:
        return {
            "ce": self.ce,
            "bpb": self.bpb,
            "perplexity": math.exp(self.ce) if self.ce < 700 else math.inf,
            "tokens": self.tokens,
            "bytes": self.n_bytes,
        }


@dataclass(frozen=True)
class Evaluation:
    """Overall and per-domain scores, and one row of statistics per sparse layer."""

    overall: Score
    domains: dict[str, Score]
    routing: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        domains = {name: score.as_json() for name, score in self.domains.items()}
        return {**self.overall.as_json(), "domains": domains, "routing": self.routing}


class RoutingTally:
    """Sums each sparse layer's token counts and router entropy over batches."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.counts: Tensor | None = None  # (L, E)
        self.entropy: Tensor | None = None  # (L,), weighted by tokens
        self.tokens = 0

    def add(self, routings: list[Any]) -> None:
        sparse = [(layer, r) for layer, r in enumerate(routings) if r is not None]
        if not sparse:
            return
        self.layers = [layer for layer, _ in sparse]
        n_tokens = sparse[0][1].ids.shape[0]
        counts = torch.stack([r.counts for _, r in sparse])
        entropy = torch.stack([router_entropy(r.probs.detach()) for _, r in sparse]) * n_tokens
        self.counts = counts if self.counts is None else self.counts + counts
        self.entropy = entropy if self.entropy is None else self.entropy + entropy
        self.tokens += n_tokens

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per sparse layer: its number, loads (shares) and statistics."""
        if self.counts is None or self.entropy is None:
            return []
        statistics = load_statistics(self.counts)
        shares = self.counts / self.counts.sum(-1, keepdim=True)
        entropy = self.entropy / self.tokens
        return [
            {
                "layer": layer,
                "load": shares[row].tolist(),
                **{name: values[row].item() for name, values in statistics.items()},
                "router_entropy": entropy[row].item(),
            }
            for row, layer in enumerate(self.layers)
        ]


@torch.no_grad()
def evaluate(model: GPT, corpus: Corpus, *, batch_size: int, precision: str) -> Evaluation:
    """Score the whole validation split; leaves the model in the mode it was in.

    `precision` is "fp32" or "bf16" (autocast).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = torch.zeros(len(corpus.domains), dtype=torch.float64)
    tokens = torch.zeros(len(corpus.domains), dtype=torch.int64)
    tally = RoutingTally()
    try:
        for inputs, targets, domain_ids in _batches(corpus, model.config.context, batch_size):
            with autocast(device, precision):
                logits, routings = model(inputs.to(device))
            losses = cross_entropy(logits, targets.to(device), reduction="none")
            nats.index_add_(0, domain_ids, losses.double().cpu())
            tokens.index_add_(0, domain_ids, torch.ones_like(domain_ids))
            tally.add(routings)
    finally:
        model.train(was_training)
    return _summarize(corpus, nats, tokens, tally)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bf16 for "bf16", nothing for "fp32"."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _batches(
    corpus: Corpus, context: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(B, T) inputs, (B, T) targets, (B*T,) domain ids; the short last window comes alone."""
    windows = EvalWindows(corpus.val, context, corpus.tokenizer.end_id)
    full = len(windows) if len(corpus.val) % context == 0 else len(windows) - 1
    starts = [(i, min(i + batch_size, full)) for i in range(0, full, batch_size)]
    if full < len(windows):
        starts.append((full, full + 1))
    for first, last in starts:
        columns = zip(*(windows[i] for i in range(first, last)), strict=True)
        inputs, targets, domains = (torch.from_numpy(np.stack(column)) for column in columns)
        yield inputs, targets, domains.flatten()


def _summarize(corpus: Corpus, nats: Tensor, tokens: Tensor, tally: RoutingTally) -> Evaluation:
    n_bytes = np.bincount(
        corpus.val.domain_ids, weights=corpus.val.n_bytes, minlength=len(corpus.domains)
    ).astype(np.int64)
    domains = {
        name: Score(nats[i].item(), int(tokens[i]), int(n_bytes[i]))
        for i, name in enumerate(corpus.domains)
        if tokens[i]
    }
    overall = Score(nats.sum().item(), int(tokens.sum()), int(n_bytes.sum()))
    return Evaluation(overall, domains, tally.rows())
