"""From the recipe's `data` section to documents, and from documents to the two splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text import embedded, files, hub
from nano_moe.text.split import Document, cut_long, split_by_name

__all__ = ["Document", "Sources", "documents", "split"]

LEAST_VAL_BYTES = 50_000  # of each embedded domain, where its share lets one expect it


class Sources(NamedTuple):
    """What was found to read, and what the text depends on (package versions, file contents)."""

    embedded: list[embedded.Found]
    files: list[files.TextFile]
    hub: hub.Found | None = None

    @property
    def identity(self) -> list[str]:
        found = [f"{here.domain} {here.identity}" for here in self.embedded]
        streamed = [self.hub.identity] if self.hub else []
        return found + [file.identity for file in self.files] + streamed


def sources(data: DataConfig) -> Sources:
    """Locate the text without reading it. Raises UserError when there is none."""
    if data.files:
        return Sources([], files.listed(data.files))
    if data.hub:
        return Sources([], [], hub.found(data.hub))
    return Sources(embedded.present(data.domains), [])


def documents(data: DataConfig, found: Sources | None = None) -> Iterator[Document]:
    """All documents, domain by domain, long ones cut.

    A lone file of the user's stays whole, since it is split from its end. Raises UserError for
    text that is missing, empty or not text.
    """
    found = found or sources(data)
    for domain in found.embedded:
        yield from embedded.taken(domain, data.bytes_per_domain)
    if found.files:
        yield from _cut(files.read(found.files))
    if found.hub:
        for document in hub.Stream(found.hub):
            yield from cut_long(document)


def _cut(whole: Iterable[Document]) -> Iterator[Document]:
    """Long documents in pieces, unless there is but one."""
    stream = iter(whole)
    first = list(islice(stream, 2))
    if len(first) == 1:
        yield first[0]
        return
    for document in chain(first, stream):
        yield from cut_long(document)


def split(everything: list[Document], data: DataConfig) -> tuple[list[Document], list[Document]]:
    """(training, validation): each embedded domain by itself, the user's documents together.

    Raises UserError when an embedded domain keeps too little text for validation.
    """
    groups: dict[str, list[Document]] = {}
    for document in everything:
        groups.setdefault("" if data.files else document.domain, []).append(document)
    train: list[Document] = []
    val: list[Document] = []
    for domain, group in groups.items():
        train_part, val_part = split_by_name(group, data.val_fraction)
        if not data.files:
            _check_validation(domain, sum(document.n_bytes for document in val_part), data)
        train += train_part
        val += val_part
    return train, val


def _check_validation(domain: str, n_bytes: int, data: DataConfig) -> None:
    expected = data.bytes_per_domain * data.val_fraction
    least = LEAST_VAL_BYTES if expected >= LEAST_VAL_BYTES else 1
    if n_bytes < least:
        raise UserError(
            f"domain {domain} keeps {n_bytes:,} bytes for validation, fewer than {least:,}; "
            f"raise data.val_fraction={data.val_fraction} or drop the domain from data.domains"
        )
