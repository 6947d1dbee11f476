"""A text's way through a model: its tokens, and what every sparse layer decided for each.

Shapes: T inputs, N = T - 1 tokens of text, E experts, K chosen by a token, V vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor

from nano_moe.explorer.contract import Choice, Layer, Trace
from nano_moe.model.gpt import GPT
from nano_moe.model.loss import cross_entropy
from nano_moe.model.router import HashRouter, Router
from nano_moe.model.routing import Routing, drop_overflow
from nano_moe.text.tokenizer import Tokenizer


def trace_text(model: GPT, tokenizer: Tokenizer, text: str) -> Trace:
    """Route a text as the beginning of a document, as much of it as the context holds."""
    ids = tokenizer.encode(text)
    room = model.config.context - 1  # the end token of the document before comes first
    return trace_tokens(model, tokenizer, ids[:room], cut=max(0, len(ids) - room))


@torch.no_grad()
def trace_tokens(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], *, cut: int = 0, domain: str | None = None
) -> Trace:
    """Route tokens that are fewer than the context, after an end token."""
    inputs = torch.tensor([[tokenizer.end_id, *ids]])
    logits, routings = model(inputs)
    routers = iter(model.routers)
    moe = model.config.moe
    capacity = None if moe is None else moe.capacity_factor
    found: Trace = {
        "tokens": texts(tokenizer, ids),
        "nats": _nats(logits[:, :-1], inputs[:, 1:]) if model.config.is_causal else None,
        "layers": [
            _layer(number, routing, next(routers), capacity)
            for number, routing in enumerate(routings)
            if routing is not None
        ],
        "cut": cut,
    }
    if domain is not None:
        found["domain"] = domain
    return found


def last_choice(number: int, routing: Routing) -> Choice:
    """What a layer decided for the newest of its tokens."""
    (chosen,), (weights,) = _chosen(_rows(routing, slice(-1, None)))
    probs: list[float] = rounded(routing.probs[-1])
    return {"layer": number, "probs": probs, "chosen": chosen, "weights": weights}


def texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; one that completes no character shows its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [token_text(tokenizer, token, decoder) for token in ids]


def token_text(tokenizer: Tokenizer, token: int, decoder: codecs.IncrementalDecoder) -> str:
    """What a token adds to the text that the decoder has read so far."""
    if token in tokenizer.special:
        return f"⟨{tokenizer.special[token].strip('<|>')}⟩"
    piece = tokenizer.decode_bytes([token])
    text = decoder.decode(piece)
    if text.strip("�") or piece.decode(errors="ignore"):
        return text
    return f"⟨{piece.hex()}⟩"


def rounded(values: Tensor, digits: int = 4) -> list:
    """Nested lists of numbers with few digits; what is not finite becomes 0."""
    scale = 10**digits
    finite = torch.nan_to_num(values.detach().double(), 0.0, 0.0, 0.0)
    return finite.mul(scale).round().div(scale).tolist()


def _nats(logits: Tensor, targets: Tensor) -> list[float]:
    if targets.numel() == 0:
        return []
    return rounded(cross_entropy(logits, targets, reduction="none"), 3)


def _layer(
    number: int, routing: Routing, router: Router | HashRouter, capacity: float | None
) -> Layer:
    dropped = None
    if capacity is not None:
        full = ~drop_overflow(routing, 1, capacity).kept[1:]  # type: ignore[index]
        rows = zip(routing.ids[1:].tolist(), full.tolist(), strict=True)
        dropped = [[e for e, out in zip(*row, strict=True) if out] for row in rows]
    text = _rows(routing, slice(1, None))
    chosen, weights = _chosen(text)
    bias = None if router.expert_bias is None else rounded(router.expert_bias)
    return {
        "layer": number,
        "probs": rounded(text.probs),
        "chosen": chosen,
        "weights": weights,
        "dropped": dropped,
        "bias": bias,
    }


def _rows(routing: Routing, rows: slice) -> Routing:
    kept = None if routing.kept is None else routing.kept[rows]
    return routing._replace(
        ids=routing.ids[rows], weights=routing.weights[rows], probs=routing.probs[rows], kept=kept
    )


def _chosen(routing: Routing) -> tuple[list[list[int]], list[list[float]]]:
    """Experts of each token, best first, and their weights; where experts choose, any number."""
    ids, weights = routing.ids.tolist(), rounded(routing.weights)
    if routing.kept is None:
        return ids, weights
    chosen, theirs = [], []
    for row in zip(ids, weights, routing.kept.tolist(), strict=True):
        taken = sorted(((w, e) for e, w, kept in zip(*row, strict=True) if kept), reverse=True)
        chosen.append([e for _, e in taken])
        theirs.append([w for w, _ in taken])
    return chosen, theirs
