"""Byte strings as GPT-2's vocabulary and merges write them; without transformers."""

from __future__ import annotations

from collections.abc import Sequence

from nano_moe.errors import UserError
from nano_moe.text.spelling import SPELLING
from nano_moe.text.tokenizer import Tokenizer

END = "<|endoftext|>"


def spelt(piece: bytes) -> str:
    """A byte string as GPT-2's vocabulary writes it."""
    return "".join(SPELLING[byte] for byte in piece)


def merges_of(pieces: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The two pieces that each piece of more than one byte was merged from, best rank first."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    return [_halves(piece, ranks) for piece in pieces if len(piece) > 1]


def _halves(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """What is left of a piece when all merges before its own are done."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[piece]:
            raise UserError(f"the tokenizer's piece {piece!r} is no merge of two others before it")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def check_pieces(tokenizer: Tokenizer) -> None:
    """Raises UserError where two ids stand for the same bytes, which a vocabulary cannot say."""
    pieces = tokenizer.pieces[:-1]
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece in pieces if pieces.count(piece) > 1)
        raise UserError(f"two ids of the tokenizer stand for {twice!r}; no vocabulary holds that")
