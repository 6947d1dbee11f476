"""Passages of the validation split to look at, by domain."""

from __future__ import annotations

import numpy as np

from nano_moe.text.store import Corpus

LONGEST = 200  # tokens
EACH = 50  # passages that can be asked for in a domain
SPREAD = 0.618034  # of a domain between one passage and the next: they stay apart


def passage(corpus: Corpus, domain: int, number: int, context: int) -> list[int]:
    """Token ids of a passage, as many as a context holds after an end token; at least one.

    Number 0 starts where the domain does, the others are spread over it; each starts at the
    beginning of a document or of a line, if there is one soon.
    """
    split, length = corpus.val, min(LONGEST, context - 1)
    documents = np.flatnonzero(split.domain_ids == domain)
    ends = np.append(split.starts[1:], len(split)) - 1  # of each document, its end token left out
    lengths = (ends - split.starts)[documents]
    before = np.concatenate(([0], np.cumsum(lengths)))
    place = int((number * SPREAD % 1) * before[-1])
    i = int(np.searchsorted(before, place, side="right")) - 1
    offset = min(place - int(before[i]), max(0, int(lengths[i]) - length))
    lo, hi = int(split.starts[documents[i]]), int(ends[documents[i]])
    if offset:
        lo = _line_start(corpus, lo + offset, min(lo + offset + length, hi))
    return split.tokens[lo : min(lo + length, hi)].tolist()


def n_passages(corpus: Corpus, domain: int) -> int:
    """How many there are; none where the validation split lacks the domain."""
    return EACH if domain in corpus.val.domain_ids else 0


def _line_start(corpus: Corpus, lo: int, hi: int) -> int:
    """The first position in lo..hi that begins a line that is not empty; without one, lo."""
    pieces = corpus.tokenizer.pieces
    breaks = [pieces[int(token)].endswith(b"\n") for token in corpus.val.tokens[lo:hi]]
    for i in range(1, len(breaks)):
        if breaks[i - 1] and not breaks[i]:
            return lo + i
    return lo
