"""Documents, how long ones are cut, and which of them are held out for validation.

A hash of a document's name gives every document a fixed place in a line. Validation takes from the
front of that line until it holds its share of the bytes, so neither the order of files nor a
random seed has a say in what is held out. Near copies of one text stand in line as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LONGEST = 64 * 1024  # bytes; a document above it is cut before it is split
KIN_SHARE = 0.3  # of the shorter text's 8-word runs; two texts that share more are near copies


class Document(NamedTuple):
    """One text that ends with an end-of-document token; `name` is unique and decides its split.

    Documents that share a `kin` are never parted by the split.
    """

    name: str
    domain: str
    text: str
    kin: str = ""

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def name_hash(name: str) -> int:
    """A document's place in the line: the first eight bytes of its name's sha256."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8])


def in_hash_order(documents: Iterable[Document]) -> list[Document]:
    """The documents in the order that decides which are taken and which are held out."""
    return sorted(documents, key=lambda document: (name_hash(document.name), document.name))


def cut_long(document: Document, longest: int = LONGEST) -> list[Document]:
    """Pieces of about half of `longest` bytes, or the document itself when it is no longer.

    The pieces' texts add up to the document's; each is named by the document and its index.
    """
    if document.n_bytes <= longest:
        return [document]
    pieces = _pieces(document.text.encode(), max(longest // 2, 8))
    return [
        document._replace(name=f"{document.name}#{i}", text=piece.decode())
        for i, piece in enumerate(pieces)
    ]


def head(text: str, n_bytes: int) -> str:
    """The longest start of the text within `n_bytes` that ends well (see `_cut_before`)."""
    raw = text.encode()
    return text if len(raw) <= n_bytes else raw[: _cut_before(raw, 0, n_bytes)].decode()


def kindred(documents: list[Document]) -> list[Document]:
    """The documents with near copies of one another marked as kin, as licences often are."""
    runs = []
    for document in documents:
        words = document.text.split()
        runs.append({hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)})
    kin = [document.name for document in documents]
    for i, mine in enumerate(runs):
        for j, other in enumerate(runs[:i]):
            if kin[i] != kin[j] and len(mine & other) > KIN_SHARE * min(len(mine), len(other)):
                first, last = sorted((kin[i], kin[j]))
                kin = [first if name == last else name for name in kin]
    return [d._replace(kin=name) for d, name in zip(documents, kin, strict=True)]


def split_by_name(
    documents: list[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """(training, validation): validation gets `fraction` of the bytes, in hash order.

    Kin stay together. At least one document goes to each side; a lone one is split from its end.
    """
    if len(documents) == 1:
        return split_from_end(documents[0], fraction)
    line: dict[str, list[Document]] = {}
    for document in in_hash_order(documents):
        line.setdefault(document.kin or document.name, []).append(document)
    if len(line) == 1:
        return split_by_name([document._replace(kin="") for document in documents], fraction)
    quota = fraction * sum(document.n_bytes for document in documents)
    chosen = _held_out(line, quota)
    train = [d for name, kin in line.items() if name not in chosen for d in kin]
    return train, [d for name in chosen for d in line[name]]


def _held_out(line: dict[str, list[Document]], quota: float) -> list[str]:
    """Names from the front of the line with `quota` bytes in all; kin of over twice that wait."""
    names = sorted(line, key=lambda name: (name_hash(name), name))
    chosen: list[str] = []
    held = 0
    for name in names[:-1]:
        size = sum(document.n_bytes for document in line[name])
        if held < quota and (len(line[name]) == 1 or size <= 2 * quota):
            chosen.append(name)
            held += size
    return chosen or names[:1]


def split_from_end(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation): the last `fraction` of the text, from a line's start if one is near.

    Either side is empty when the text is too short to be split.
    """
    text = document.text
    exact = len(text) - round(fraction * len(text))
    near = min(200, (len(text) - exact) // 4, exact // 4)
    ends = [i for i in range(exact - near, exact + near) if text[i - 1 : i] == "\n"]
    cut = min(ends, key=lambda i: abs(i - exact), default=exact)
    parts = ("start", text[:cut]), ("end", text[cut:])
    train, val = (
        [document._replace(name=f"{document.name}#{end}", text=part)] if part else []
        for end, part in parts
    )
    return train, val


def _pieces(raw: bytes, target: int) -> Iterator[bytes]:
    start = 0
    while len(raw) - start > target * 3 // 2:
        end = _cut_before(raw, start, start + target)
        yield raw[start:end]
        start = end
    yield raw[start:]


def _cut_before(raw: bytes, start: int, end: int) -> int:
    """The last paragraph end in the later half of start..end, else line end, else character end."""
    for mark in (b"\n\n", b"\n"):
        found = raw.rfind(mark, (start + end) // 2, end)
        if found >= 0:
            return found + len(mark)
    while end > start and raw[end] & 0xC0 == 0x80:
        end -= 1
    return end
