"""The files of a split's tokens as they grow, a batch of documents at a time.

What was appended and noted is there to go on from, whatever happened since.
"""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from nano_moe.text.split import Document
from nano_moe.text.tokenizer import Tokenizer

HEADER = "split\tdomain\tfirst_token\tbytes\ttokens\tname\n"


class Growing:
    """A .npy file of rows; once closed, it is what `np.save` writes of all of them.

    Of a file begun before, the first `length` rows are kept. Raises OSError when the disk refuses,
    and ValueError where the file is shorter.
    """

    def __init__(self, path: Path, dtype: np.dtype, row: tuple[int, ...] = (), length: int = 0):
        self.dtype, self.row, self.length = dtype, row, length
        self.file: IO[bytes] = path.open("r+b" if length else "w+b")
        self._write_header()
        _keep(self.file, self.file.tell() + length * dtype.itemsize * int(np.prod(row)))

    def append(self, rows: np.ndarray) -> None:
        """Rows (n, *row)."""
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)
        self.length += len(rows)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self) -> None:
        """It has the same size for every length."""
        shape = (self.length, *self.row)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)


class SplitWriter:
    """Tokens, table and names of one split's documents, which are appended in order.

    `noted` is what `note` said of an earlier one, whose documents are here; of a new one, `names`
    alone, where its lines begin in documents.tsv.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tokenizer: Tokenizer,
        domains: list[str],
        noted: dict[str, Any],
    ):
        tokens, documents = noted.get("tokens", 0), noted.get("documents", 0)
        self.name, self.tokenizer, self.domains = name, tokenizer, domains
        self.tokens = Growing(folder / f"{name}.npy", np.dtype(tokenizer.dtype), (), tokens)
        table = folder / f"{name}_documents.npy"
        self.table = Growing(table, np.dtype(np.int64), (3,), documents)
        self.sums = np.zeros((len(domains), 3), np.int64)  # bytes, tokens, documents
        self.sums[:] = noted.get("sums", 0)
        self._end = np.array([tokenizer.end_id], tokenizer.dtype)
        self._names = (folder / "documents.tsv").open("a+b")
        _keep(self._names, noted["names"])

    @property
    def n_documents(self) -> int:
        return self.table.length

    def append(self, documents: list[Document]) -> None:
        """Tokenize them, each with the end token after it."""
        encoded = self.tokenizer.encode_batch([document.text for document in documents])
        ids = [np.concatenate((one, self._end)) for one in encoded]
        rows = self._rows(documents, ids)
        self.tokens.append(np.concatenate(ids))
        self.table.append(rows[:, :3])
        for i in np.unique(rows[:, 1]):
            mine = rows[rows[:, 1] == i]
            self.sums[i] += (mine[:, 2].sum(), mine[:, 3].sum(), len(mine))
        self._write_names(documents, rows)

    def note(self) -> dict[str, Any]:
        """Hand all to the system; what finds it again, in plain values."""
        for file in (self.tokens.file, self.table.file, self._names):
            file.flush()
        return {
            "tokens": self.tokens.length,
            "documents": self.table.length,
            "sums": self.sums.tolist(),
            "names": self._names.tell(),
        }

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *fault: object) -> None:
        """After a fault, too, nothing stays open that could still be written at a later time."""
        if kind is None:
            self.tokens.close()
            self.table.close()
        for file in (self.tokens.file, self.table.file, self._names):
            with suppress(OSError) if kind else nullcontext():
                file.close()

    def _rows(self, documents: list[Document], ids: list[np.ndarray]) -> np.ndarray:
        """(documents, 4) int64: first token, domain id, bytes as spelt, tokens."""
        lengths = np.array([len(one) for one in ids], np.int64)
        starts = self.tokens.length + np.cumsum(lengths) - lengths
        domain_ids = [self.domains.index(document.domain) for document in documents]
        spelt = (one._replace(text=self.tokenizer.canonical(one.text)) for one in documents)
        n_bytes = [document.n_bytes for document in spelt]
        return np.stack([starts, domain_ids, n_bytes, lengths], axis=1).astype(np.int64)

    def _write_names(self, documents: list[Document], rows: np.ndarray) -> None:
        """One line per document; names are JSON strings, so a line stays a line."""
        lines = [] if self._names.tell() else [HEADER]
        for document, (start, _, n_bytes, n_tokens) in zip(documents, rows, strict=True):
            name = json.dumps(document.name)
            facts = (self.name, document.domain, start, n_bytes, n_tokens, name)
            lines.append("\t".join(map(str, facts)) + "\n")
        self._names.write("".join(lines).encode("utf-8"))


def _keep(file: IO[bytes], size: int) -> None:
    """Cut off what comes after, and go there; raises ValueError where bytes are missing."""
    if file.seek(0, 2) < size:
        raise ValueError(f"{file.name}: shorter than the {size} bytes noted")
    file.truncate(size)
    file.seek(size)
