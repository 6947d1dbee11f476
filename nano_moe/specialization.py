"""What a token's experts tell about the token: kinds of tokens, information and its control.

Shapes: W windows of T tokens, N = W*T tokens, E experts, K top_k, A values of an attribute.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nano_moe.evaluation import count_pairs
from nano_moe.model.balance import mutual_information

KINDS = ("word start", "word part", "number", "punctuation", "white space", "other")


class Told(NamedTuple):
    """Bits of information of expert with attribute, and of expert with shuffled attribute."""

    bits: float
    control: float


def kind_of(piece: bytes) -> int:
    """What a token's bytes look like, as a place in KINDS; a word starts after a blank.

    Other: letters beside digits, bytes that form no character, and the end of a document.
    """
    text = piece.decode("utf-8", errors="replace")
    if text and not text.strip():
        return KINDS.index("white space")
    letters, digits = any(map(str.isalpha, text)), any(map(str.isnumeric, text))
    if not text or "�" in text or (letters and digits):
        return KINDS.index("other")
    if letters:
        return KINDS.index("word start" if text[0].isspace() else "word part")
    return KINDS.index("number" if digits else "punctuation")


def joint(values: Tensor, ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """How often a token of each attribute value (N,) chose each expert (N, K): (A, E)."""
    table = torch.zeros(shape, dtype=torch.int64)
    count_pairs(table, values, ids)
    return table


def shuffled(values: Tensor, seed: int, *, whole_windows: bool) -> Tensor:
    """Attribute values (W, T) dealt out anew, token by token or by whole windows: (N,).

    A window is of one text, so its tokens have more in common than their domain: only shuffling
    whole windows says what a domain tells beyond that.
    """
    generator = torch.Generator().manual_seed(seed)
    if whole_windows:
        return values[torch.randperm(len(values), generator=generator)].flatten()
    return values.flatten()[torch.randperm(values.numel(), generator=generator)]


def told(values: Tensor, ids: Tensor, table: Tensor, *, whole_windows: bool, shuffles: int) -> Told:
    """Of attribute values (W, T), experts (N, K) and their joint counts (A, E)."""
    shape = (table.shape[0], table.shape[1])
    dealt = (shuffled(values, seed, whole_windows=whole_windows) for seed in range(shuffles))
    control = [mutual_information(joint(anew, ids, shape)) for anew in dealt]
    return Told(mutual_information(table).item(), torch.stack(control).mean().item())


def affinity(table: Tensor, at_least: int) -> Tensor:
    """Of (A, E) counts, the share of a value's assignments that each expert takes: (A, E).

    0 for values with fewer assignments than `at_least`.
    """
    times = table.sum(1, keepdim=True)
    return torch.where(times >= at_least, table / times.clamp_min(1), 0)
