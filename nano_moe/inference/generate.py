"""Continue prompts, token by token, as text that streams.

Shapes: B prompts, T time, V vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nano_moe.errors import UserError
from nano_moe.inference.decoding import Decoding
from nano_moe.model.gpt import GPT
from nano_moe.text.tokenizer import Tokenizer


def next_token_probabilities(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Logits (..., V) to the distributions to draw from: temperature, then top-k, then top-p.

    Temperature 0 puts everything on the likeliest token. Top-p keeps the smallest set of
    likeliest tokens whose mass reaches `top_p` (Holtzman et al. 2020, eq. 2-3).
    """
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite; this run diverged, use another")
    logits = logits.double()  # so that a tiny temperature or top-p does not round to 0
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    largest = logits.amax(-1, keepdim=True)
    ranked, order = ((logits - largest) / temperature).sort(dim=-1, descending=True, stable=True)
    ranked = ranked.softmax(-1)
    if top_k is not None:
        ranked[..., top_k:] = 0
    before = ranked.cumsum(-1) - ranked
    ranked[before >= top_p * ranked.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(logits).scatter_(-1, order, ranked / ranked.sum(-1, keepdim=True))


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Yield pieces of text as they are sampled, until a token that ends texts or `max_tokens`.

    An empty prompt starts a new document. When the context is full, its later half goes on. Raises
    UserError for a model that sees the future.
    """
    pieces = generate_all(
        model, tokenizer, [prompt], max_tokens=max_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed,
    )  # fmt: skip
    return (piece for _, piece in pieces)


def generate_all(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """As `generate`, of several prompts at once: (number of the prompt, piece) as they are drawn.

    Prompt i draws from a generator seeded with `seed` + i, as if it were alone.
    """
    model.config.check_causal()
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    rows = [[tokenizer.end_id, *(int(i) for i in tokenizer.encode(text))] for text in prompts]
    fresh = [row for row, ids in enumerate(rows) if len(ids) == 1]
    return _pieces(Decoding(model, rows), len(rows), fresh, tokenizer, max_tokens, drawing, seed)


def _pieces(
    decoding: Decoding,
    n_rows: int,
    fresh: list[int],
    tokenizer: Tokenizer,
    max_tokens: int,
    drawing: dict[str, Any],
    seed: int,
) -> Iterator[tuple[int, str]]:
    generators = [torch.Generator().manual_seed(seed + row) for row in range(n_rows)]
    text = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n_rows)]
    going, ends = list(range(n_rows)), tokenizer.stop_ids
    for _ in range(max_tokens):
        logits = decoding.next_logits()[:, : tokenizer.n_vocab].cpu()  # (B, V)
        chances = next_token_probabilities(logits, **drawing)
        drawn = [
            int(torch.multinomial(chance, 1, generator=generators[row]))
            for row, chance in zip(going, chances, strict=True)
        ]
        for row, token in zip(going, drawn, strict=True):
            if token not in ends:
                piece = tokenizer.decode_bytes([token])
                if row in fresh and piece:  # a document begins here
                    fresh.remove(row)
                    piece = piece.removeprefix(tokenizer.lead)
                yield row, text[row].decode(piece)
        decoding.append(drawn, [token not in ends for token in drawn])
        going = [r for r, token in zip(going, drawn, strict=True) if token not in ends]
        if not going:
            break
    for row, rest in enumerate(text):
        yield row, rest.decode(b"", final=True)


def check_sampling(
    *, max_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int
) -> None:
    """Raises UserError for settings that no distribution fits."""
    if max_tokens < 1:
        raise UserError(f"--tokens {max_tokens}: ask for at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k {top_k}: must be at least 1")
    if abs(seed) >= 2**63:
        raise UserError(f"--seed {seed}: must fit 64 bits")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0 and at most 1")
