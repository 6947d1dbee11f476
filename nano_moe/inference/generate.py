"""Continue prompts, token by token, as text that streams.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nano_moe.errors import UserError
from nano_moe.inference.decoding import Decoding
from nano_moe.inference.sampling import draw
from nano_moe.model.gpt import GPT
from nano_moe.text.tokenizer import Tokenizer


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
    prefixes = [[tokenizer.end_id, *(int(i) for i in tokenizer.encode(text))] for text in prompts]
    rows = [_Row(seed + i, fresh=len(prefix) == 1) for i, prefix in enumerate(prefixes)]
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _pieces(Decoding(model, prefixes), rows, tokenizer, max_tokens, drawing)


class _Row:
    """One prompt's dice, and its bytes on their way to being text."""

    def __init__(self, seed: int, *, fresh: bool):
        self.generator = torch.Generator().manual_seed(seed)
        self.text = codecs.getincrementaldecoder("utf-8")("replace")
        self.fresh = fresh  # a document begins here

    def read(self, piece: bytes, lead: bytes) -> str:
        if self.fresh and piece:
            self.fresh = False
            piece = piece.removeprefix(lead)
        return self.text.decode(piece)


def _pieces(
    decoding: Decoding,
    rows: list[_Row],
    tokenizer: Tokenizer,
    max_tokens: int,
    drawing: dict[str, Any],
) -> Iterator[tuple[int, str]]:
    going, ends = list(range(len(rows))), tokenizer.stop_ids
    for _ in range(max_tokens):
        logits = decoding.next_logits()[:, : tokenizer.n_vocab].cpu()  # (B, V)
        drawn = draw(logits, [rows[row].generator for row in going], **drawing)
        stays = [token not in ends for token in drawn]
        for row, token, stay in zip(going, drawn, stays, strict=True):
            if stay:
                yield row, rows[row].read(tokenizer.decode_bytes([token]), tokenizer.lead)
        decoding.append(drawn, stays)
        going = [row for row, stay in zip(going, stays, strict=True) if stay]
        if not going:
            break
    for number, begun in enumerate(rows):
        yield number, begun.text.decode(b"", final=True)


def check_sampling(
    *, max_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int
) -> None:
    """Raises UserError for settings that no distribution fits."""
    if max_tokens < 1:
        raise UserError(f"--tokens {max_tokens}: ask for at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be a finite number, 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k {top_k}: must be at least 1")
    if abs(seed) >= 2**63:
        raise UserError(f"--seed {seed}: must fit 64 bits")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0 and at most 1")
