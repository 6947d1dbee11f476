"""The user's own text: files and folders of plain text, .jsonl and .parquet.

A file named directly is read whatever its ending. A folder is walked in sorted order and gives its
files with a known text ending; hidden ones are passed over. The domain is the file's stem, or for
a folder its name, or the name of the first folder inside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from nano_moe.errors import UserError
from nano_moe.text.split import Document

_RECORDS = {".jsonl", ".ndjson", ".parquet"}
_PLAIN = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .csv .tsv .html .htm .xml .yaml .yml .toml .ini"
    " .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .js .ts .jsx .tsx .java .kt .rb .php .sh .sql .lua"
    " .r .jl .scala .swift .hs .ml .css".split()
)


class TextFile(NamedTuple):
    """One file to read; `name` does not depend on where its folder lies."""

    path: Path
    name: str
    domain: str

    @property
    def identity(self) -> str:
        """Name, domain and sha256 of the content. Raises UserError when it cannot be read."""
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return f"{self.name} {self.domain} {digest}"


def listed(named: tuple[str, ...]) -> list[TextFile]:
    """All text files that `data.files` names, each once, under a name of its own.

    Raises UserError for a missing or textless path.
    """
    files: dict[Path, TextFile] = {}
    names: Counter[str] = Counter()
    for file in (file for name in named for file in _files_of(Path(os.path.expanduser(name)))):
        if file.path.resolve() in files:
            continue
        names[file.name] += 1
        if names[file.name] > 1:
            file = file._replace(name=f"{file.name}~{names[file.name]}")
        files[file.path.resolve()] = file
    return list(files.values())


def _files_of(path: Path) -> list[TextFile]:
    if path.is_file():
        return [TextFile(path, path.name, path.stem)]
    if not path.is_dir():
        raise UserError(f"data.files: {path} does not exist; check the path")
    base = path.resolve().name or "root"
    files = []
    for inner in sorted(path.rglob("*")):
        parts = inner.relative_to(path).parts
        if any(part.startswith(".") for part in parts) or not inner.is_file():
            continue
        if inner.suffix.lower() in _PLAIN | _RECORDS:
            domain = parts[0] if len(parts) > 1 else base
            files.append(TextFile(inner, "/".join((base, *parts)), domain))
    if not files:
        raise UserError(
            f"data.files: folder {path} holds no text files (.txt, .md, .jsonl, .parquet, ...); "
            "put some there, or name a file itself"
        )
    return files


def read(files: list[TextFile]) -> Iterator[Document]:
    """The documents of the files: a plain file is one, a .jsonl line or .parquet row is one each.

    Empty texts are passed over. Raises UserError when a file is not what its ending says, and when
    nothing but empty texts is found.
    """
    empty = True
    for file in files:
        for document in _documents(file):
            if document.text:
                empty = False
                yield document
    if empty:
        where = files[0].path if len(files) == 1 else f"the {len(files)} files of data.files"
        raise UserError(f"{where}: no text in it; put some there, or name another file")


def _documents(file: TextFile) -> Iterator[Document]:
    suffix = file.path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(file)
    elif suffix in _RECORDS:
        yield from _jsonl(file)
    else:
        yield Document(file.name, file.domain, _text(file.path))


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _decoded(raw, path, 0)


def _lines(path: Path) -> Iterator[str]:
    """One after the other, so that a file may be larger than memory."""
    offset = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                yield _decoded(raw, path, offset).rstrip("\n")
                offset += len(raw)
    except OSError as error:
        raise _unreadable(path, error) from error


def _decoded(raw: bytes, path: Path, offset: int) -> str:
    """The text of the bytes that lie at `offset` in a file."""
    zero = raw.find(b"\0")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        bad = error.start if zero < 0 else min(zero, error.start)
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + bad} (0x{raw[bad]:02x}); save it as UTF-8 text, "
            "or leave it out of data.files"
        ) from error
    if zero >= 0:
        raise UserError(
            f"{path}: binary, with a zero at byte {offset + zero}; save it as UTF-8 text, "
            "or leave it out of data.files"
        )
    return text if offset else text.removeprefix("\ufeff")


def _jsonl(file: TextFile) -> Iterator[Document]:
    for number, line in enumerate(_lines(file.path), 1):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).split(":")[0] or "too deep"
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(
                f'{where}: not JSON ({reason}{column}); write one {{"text": "..."}} a line'
            ) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{where}: no string under "text"; write one {{"text": "..."}} a line')
        yield Document(f"{file.name}:{number}", file.domain, _whole(text, where))


def _parquet(file: TextFile) -> Iterator[Document]:
    with closing(_parquet_texts(file.path)) as texts:
        for number, text in enumerate(texts, 1):
            where = f"{file.path}: row {number}"
            if not isinstance(text, str):
                raise UserError(f"{where}: 'text' is not a string; drop the row or fill it")
            yield Document(f"{file.name}:{number}", file.domain, _whole(text, where))


def _parquet_texts(path: Path) -> Generator[object]:
    """The column `text`, row by row; a fault anywhere in the file is the user's to mend."""
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        columns = list(rows.features or {})
        if "text" in columns:
            yield from (row["text"] for row in rows.reshard().select_columns("text"))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable parquet file ({reason}); write it again, "
            "or leave it out of data.files"
        ) from error
    if "text" not in columns:
        raise UserError(
            f"{path}: no column 'text' among {', '.join(columns)}; rename the text's column"
        )


def _whole(text: str, where: str) -> str:
    """The text, unless it holds half a surrogate pair, which no UTF-8 file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a surrogate pair at character {error.start}; replace that character"
        ) from error
    return text


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); check its permissions")
