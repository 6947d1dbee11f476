"""Cross-entropy, bits per byte and routing statistics of a model over a whole validation split.

Deterministic: every token of the split is predicted once, in non-overlapping windows, no sampling.
Cross-entropy alone: no balancing term enters any figure here. No Lightning.

Shapes: B batch, T time, N = B*T tokens, E experts, K top_k, A values of an attribute.
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

from nano_moe import ranks
from nano_moe.model.balance import load_statistics, mutual_information, router_entropy
from nano_moe.model.gpt import GPT
from nano_moe.model.loss import cross_entropy
from nano_moe.model.routing import Routing
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


STARVED = 0.1  # of an even share of the assignments: an expert with less of them starves


class RoutingTally:
    """Sums each sparse layer's choices, by domain and by token, and router entropy over batches."""

    def __init__(self, n_domains: int, vocab_size: int) -> None:
        self.sizes = {"domain": n_domains, "token": vocab_size}
        self.joint: dict[tuple[int, str], Tensor] = {}  # per layer and attribute: (A, E)
        self.entropy: dict[int, Tensor] = {}  # per layer, weighted by tokens
        self.tokens = 0

    def add(
        self, routings: list[Routing | None], inputs: Tensor, domains: Tensor, new: int = 1
    ) -> None:
        """Count one batch; `inputs` (B, T) holds token ids, `domains` (N,) what is predicted.

        `new` is 0 for a batch that was counted already.
        """
        attributes = {"domain": domains.to(inputs.device), "token": inputs.flatten()}
        for layer, routing in enumerate(routings):
            if routing is None:
                continue
            entropy = router_entropy(routing.probs.detach()) * inputs.numel() * new
            self.entropy[layer] = self.entropy.get(layer, 0) + entropy
            for name, values in attributes.items():
                if (layer, name) not in self.joint:
                    shape = (self.sizes[name], routing.counts.shape[0])
                    self.joint[layer, name] = torch.zeros(shape, dtype=torch.int64).to(values)
                if new:
                    count_pairs(self.joint[layer, name], values, routing.ids)
        self.tokens += inputs.numel() * new

    def add_others(self) -> None:
        """Count what the other processes of a training counted, too."""
        self.joint = {place: ranks.total(table) for place, table in self.joint.items()}
        self.entropy = {layer: ranks.total(entropy) for layer, entropy in self.entropy.items()}
        self.tokens = sum(ranks.gathered(self.tokens))

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per sparse layer: its number, loads (shares) and statistics."""
        return [self._row(layer) for layer in self.entropy]

    def _row(self, layer: int) -> dict[str, Any]:
        by_domain = self.joint[layer, "domain"]
        counts = by_domain.sum(0)
        information = {
            f"{name}_information": mutual_information(self.joint[layer, name]).item()
            for name in self.sizes
        }
        return {
            "layer": layer,
            "load": (counts / counts.sum()).tolist(),
            "domain_load": (by_domain / by_domain.sum(-1, keepdim=True).clamp_min(1)).tolist(),
            **{name: value.item() for name, value in load_statistics(counts).items()},
            "router_entropy": (self.entropy[layer] / self.tokens).item(),
            **information,  # in bits; load_entropy * log2(E) is the most it can be
        }


def count_pairs(table: Tensor, values: Tensor, ids: Tensor) -> None:
    """Add to (A, E) how often a token of each attribute value, (N,), chose each expert, (N, K)."""
    pairs = (values.unsqueeze(-1) * table.shape[1] + ids).flatten()
    table.view(-1).scatter_add_(0, pairs, torch.ones_like(pairs))


@torch.no_grad()
def evaluate(model: GPT, corpus: Corpus, *, batch_size: int, precision: str) -> Evaluation:
    """Score the whole validation split; leaves the model in the mode it was in.

    `precision` is "fp32" or "bf16" (autocast). Where a training has several processes all call it,
    each scores a part, and all get the whole. Raises UserError for a model that sees the future.
    """
    model.config.check_causal()
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = torch.zeros(len(corpus.domains), dtype=torch.float64)
    tokens = torch.zeros(len(corpus.domains), dtype=torch.int64)
    tally = RoutingTally(len(corpus.domains), model.config.vocab_size)
    try:
        for batch, new in _own_batches(corpus, model.config.context, batch_size):
            inputs, targets, domain_ids = batch
            inputs = inputs.to(device)
            with autocast(device, precision):
                logits, routings = model(inputs)
            losses = cross_entropy(logits, targets.to(device), reduction="none")
            nats.index_add_(0, domain_ids, losses.double().cpu() * new)
            tokens.index_add_(0, domain_ids, torch.ones_like(domain_ids) * new)
            tally.add(routings, inputs, domain_ids, new)
    finally:
        model.train(was_training)
    tally.add_others()
    return _summarize(corpus, ranks.total(nats), ranks.total(tokens), tally)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bf16 for "bf16", nothing for "fp32"."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def spread_windows(corpus: Corpus, context: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, T) inputs, targets and domains of up to `n` whole windows over the validation split."""
    windows = EvalWindows(corpus.val, context, corpus.tokenizer.end_id)
    whole = len(corpus.val) // context
    places = [i * whole // min(n, whole) for i in range(min(n, whole))]
    columns = zip(*(windows[i] for i in places), strict=True)
    inputs, targets, domains = (torch.from_numpy(np.stack(column)) for column in columns)
    return inputs, targets, domains


def _own_batches(
    corpus: Corpus, context: int, batch_size: int
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], int]]:
    """This process's batches, as many as any other has, for a forward pass may need them all.

    (B, T) inputs, (B, T) targets, (B*T,) domain ids, and 0 for what only fills up; the short last
    window comes alone.
    """
    windows = EvalWindows(corpus.val, context, corpus.tokenizer.end_id)
    full = len(windows) if len(corpus.val) % context == 0 else len(windows) - 1
    starts = [(i, min(i + batch_size, full)) for i in range(0, full, batch_size)]
    if full < len(windows):
        starts.append((full, full + 1))
    for turn in range(0, len(starts), ranks.count()):
        place = turn + ranks.rank()
        first, last = starts[min(place, len(starts) - 1)]
        columns = zip(*(windows[i] for i in range(first, last)), strict=True)
        inputs, targets, domains = (torch.from_numpy(np.stack(column)) for column in columns)
        yield (inputs, targets, domains.flatten()), int(place < len(starts))


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
