"""The tasks' figures, computed on our own decoder as lm-evaluation-harness computes them.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nano_moe.model.gpt import GPT
from nano_moe.tasks.items import Tasks
from nano_moe.text.tokenizer import Tokenizer


class Request(NamedTuple):
    """Tokens to score and those before them."""

    context: list[int]
    continuation: list[int]


class Answer(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would write it."""

    nats: float
    greedy: bool


def score(model: GPT, tokenizer: Tokenizer, tasks: Tasks, *, batch_size: int) -> dict[str, Any]:
    """All figures of the tasks, in fp32; leaves the model in the mode it was in.

    bits_per_byte of the passages; pairs: the share of pairs whose real sentence is likelier, also
    by kind; cloze: the share of words that greedy decoding gets, and the words' perplexity. A task
    without items is None. Raises UserError for a model that sees the future.
    """
    model.config.check_causal()
    was_training = model.training
    model.eval()
    try:
        run = _Scorer(model, tokenizer, batch_size)
        return {
            "bits_per_byte": _bits_per_byte(run, tasks.passages),
            "pairs": _pairs(run, tasks.pairs),
            "cloze": _cloze(run, tasks.cloze),
        }
    finally:
        model.train(was_training)


class _Scorer:
    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @torch.no_grad()
    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """An answer per request, batched by length."""
        answers: list[Answer | None] = [None] * len(requests)
        by_length = sorted(range(len(requests)), key=lambda i: -len(_input(requests[i])))
        for first in range(0, len(by_length), self.batch_size):
            places = by_length[first : first + self.batch_size]
            batch = [requests[i] for i in places]
            for place, answer in zip(places, self._batch(batch), strict=True):
                answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def _batch(self, requests: list[Request]) -> list[Answer]:
        """Rows are padded behind, where a causal model does not look."""
        inputs = [self._fitting(request) for request in requests]
        device = next(self.model.parameters()).device
        tokens = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int64)  # (B, T)
        for row, ids in zip(tokens, inputs, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        found = self.model(tokens.to(device))[0].log_softmax(-1).cpu()  # (B, T, V)
        return [
            _answer(row[: len(ids)], request.continuation)
            for row, ids, request in zip(found, inputs, requests, strict=True)
        ]

    def _fitting(self, request: Request) -> list[int]:
        return _input(request)[-self.model.config.context :]

    def whole(self, text: str) -> list[Request]:
        """A text after the end token, in windows of the context; the last one looks back."""
        ids, context = self.tokenizer.encode(text), self.model.config.context
        requests = [Request([self.tokenizer.end_id], ids[:context])]
        for start in range(context, len(ids), context):
            end = min(start + context, len(ids))
            requests.append(Request(ids[end - context - 1 : start], ids[start:end]))
        return requests


def _input(request: Request) -> list[int]:
    return (request.context + request.continuation)[:-1]


def _answer(predicted: Tensor, continuation: list[int]) -> Answer:
    """(T, V) log-probabilities, of which the last are the continuation's."""
    predicted, targets = predicted[-len(continuation) :], torch.tensor(continuation)
    nats = predicted.gather(-1, targets.unsqueeze(-1)).double().sum().item()
    return Answer(nats, bool((predicted.argmax(-1) == targets).all()))


def _bits_per_byte(run: _Scorer, passages: list[dict[str, Any]]) -> float | None:
    if not passages:
        return None
    requests = [request for passage in passages for request in run.whole(passage["text"])]
    nats = sum(answer.nats for answer in run.answers(requests))
    return -nats / math.log(2) / sum(len(passage["text"].encode()) for passage in passages)


def _pairs(run: _Scorer, pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not pairs:
        return None
    sentences = [pair[which] for pair in pairs for which in ("good", "bad")]
    end, encode = run.tokenizer.end_id, run.tokenizer.encode
    answers = run.answers([Request([end], encode(text)) for text in sentences])
    right = [one.nats >= other.nats for one, other in zip(answers[::2], answers[1::2], strict=True)]
    by_kind: dict[str, list[bool]] = {}
    for pair, found in zip(pairs, right, strict=True):
        by_kind.setdefault(pair["kind"], []).append(found)
    kinds = {kind: {"accuracy": _share(found), "n": len(found)} for kind, found in by_kind.items()}
    return {"accuracy": _share(right), "n": len(pairs), "kinds": kinds}


def _cloze(run: _Scorer, items: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not items:
        return None
    requests = []
    for item in items:
        context = run.tokenizer.encode(item["context"])
        whole = run.tokenizer.encode(f"{item['context']} {item['target']}")
        requests.append(Request(context, whole[len(context) :]))
    answers = run.answers(requests)
    mean = sum(answer.nats for answer in answers) / len(answers)
    accuracy = _share([answer.greedy for answer in answers])
    return {"accuracy": accuracy, "perplexity": math.exp(-mean), "n": len(items)}


def _share(answers: list[bool]) -> float:
    return sum(answers) / len(answers)
