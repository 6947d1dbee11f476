"""Documents in the order of their names' hashes, however many: in memory, then in files.

A document's shard is the first byte of its name's hash, so that a shard holds what stands together
in line, and the shards one after the other are the whole line. Of a corpus, one shard is in memory
at a time, and never more than WAITING bytes besides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nano_moe.text.split import Document, in_hash_order, name_hash, split_from_end

SHARDS = 256
WAITING = 16_000_000  # bytes of text held before they are appended to the shards' files


@dataclass
class Shard:
    """What one shard holds, in its file and waiting; `size` is the file's, in bytes."""

    documents: int = 0
    n_bytes: int = 0
    size: int = 0
    waiting: list[Document] = field(default_factory=list)


class Shelf:
    """Put documents in any order, then take them in the order that decides the split.

    `domains` are in the order in which they came. The files lie in `folder`, which is made when
    the first bytes do not fit into memory. Raises OSError when the disk refuses.
    """

    def __init__(self, folder: Path, kept: dict[str, Any] | None = None):
        self.folder = folder
        self.domains: dict[str, None] = dict.fromkeys(kept["domains"] if kept else ())
        shards = kept["shards"] if kept else [{}] * SHARDS
        self._shards = [Shard(**shard) for shard in shards]
        self._waiting = 0
        for number, shard in enumerate(self._shards):
            self._cut(number, shard.size)

    @property
    def n_documents(self) -> int:
        return sum(shard.documents for shard in self._shards)

    @property
    def n_bytes(self) -> int:
        return sum(shard.n_bytes for shard in self._shards)

    def put(self, document: Document) -> bool:
        """Whether its bytes, and all that waited, were just written to the files."""
        shard = self._shards[name_hash(document.name) >> 56]
        n_bytes = document.n_bytes
        shard.waiting.append(document)
        shard.documents += 1
        shard.n_bytes += n_bytes
        self._waiting += n_bytes
        self.domains.setdefault(document.domain)
        if self._waiting < WAITING:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Append to the files what waits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(self._shards):
            if shard.waiting:
                lines = [json.dumps(document[:3], ensure_ascii=False) for document in shard.waiting]
                raw = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
                with self._file(number).open("ab") as file:
                    file.write(raw)
                shard.size += len(raw)
                shard.waiting = []
        self._waiting = 0

    def kept(self) -> dict[str, Any]:
        """What finds the flushed documents again; plain values."""
        shards = [asdict(shard) for shard in self._shards]
        for shard in shards:
            del shard["waiting"]
        return {"domains": list(self.domains), "shards": shards}

    def split(self, fraction: float) -> tuple[Iterable[Document], Iterable[Document]]:
        """(training, validation) as `split_by_name` parts them, each to be walked any time."""
        if self.n_documents == 1:
            return split_from_end(next(self._after(0)), fraction)
        n_held = self._n_held_out(fraction * self.n_bytes)
        return Part(self, n_held, self.n_documents), Part(self, 0, n_held)

    def _n_held_out(self, quota: float) -> int:
        """Documents from the front of the line with `quota` bytes in all; one stays at least."""
        held = before = 0
        for number, shard in enumerate(self._shards):
            if held + shard.n_bytes >= quota:
                for document in self._shard(number):
                    if held >= quota:
                        break
                    held += document.n_bytes
                    before += 1
                break
            held += shard.n_bytes
            before += shard.documents
        return min(before, self.n_documents - 1)

    def _after(self, n: int) -> Iterator[Document]:
        """All documents in order but for the first n."""
        for number, shard in enumerate(self._shards):
            if n < shard.documents:
                yield from islice(self._shard(number), n, None)
            n = max(0, n - shard.documents)

    def _shard(self, number: int) -> Iterator[Document]:
        shard = self._shards[number]
        documents = list(shard.waiting)
        if shard.size:
            with self._file(number).open("rb") as file:
                lines = (line.decode("utf-8", "surrogatepass") for line in file)
                documents += [Document(*json.loads(line)) for line in lines]
        return iter(in_hash_order(documents))

    def _cut(self, number: int, size: int) -> None:
        """Take off what was appended after `kept`; raises ValueError where bytes are missing."""
        if not size:  # a file begun by a flush that came to no end
            self._file(number).unlink(missing_ok=True)
            return
        with self._file(number).open("r+b") as file:
            if file.seek(0, 2) < size:
                raise ValueError(f"{self._file(number)}: shorter than the {size} bytes noted")
            file.truncate(size)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:03d}.jsonl"


class Part:
    """Documents `first` to `last` of a shelf."""

    def __init__(self, shelf: Shelf, first: int, last: int):
        self.shelf, self.first, self.last = shelf, first, last

    def __iter__(self) -> Iterator[Document]:
        return self.after(0)

    def after(self, n: int) -> Iterator[Document]:
        """All but its first n."""
        return islice(self.shelf._after(self.first + n), max(0, self.last - self.first - n))
