"""Prepared tokens on disk: one folder per corpus, opened without reading it all.

A folder holds, for each split, `<split>.npy` (all tokens; every document is followed by the end
token) and `<split>_documents.npy` (a row of first token, domain and UTF-8 bytes per document), and
besides `tokenizer.json`, `documents.tsv` (the same table to look at, with names) and `meta.json`.
A folder under its final name is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.files import locked
from nano_moe.text import corpus
from nano_moe.text import tokenizer as tokenizers
from nano_moe.text.building import FORMAT, SPLITS, build, check_length
from nano_moe.text.place import LOCK, aside
from nano_moe.text.tokenizer import Tokenizer

log = logging.getLogger("nano_moe")

OURS = {"meta.json", "documents.tsv", "tokenizer.json", "train.npy", "val.npy"} | {
    f"{split}_documents.npy" for split in SPLITS
}
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError)


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and where its documents lie in them.

    tokens: (n,) uint16 or uint32, mapped from disk; starts, domain_ids, n_bytes: (documents,)
    int64. The end tokens count no bytes, so `n_bytes.sum()` is the UTF-8 length of all texts, as
    their tokens spell them.
    """

    tokens: np.ndarray
    starts: np.ndarray
    domain_ids: np.ndarray
    n_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def domains_of_tokens(self, lo: int, hi: int) -> np.ndarray:
        """The domain id of each token position in lo..hi, as (hi - lo,) int64."""
        document = np.searchsorted(self.starts, np.arange(lo, hi), side="right") - 1
        return self.domain_ids[document]


@dataclass(frozen=True)
class Corpus:
    """An opened folder of prepared tokens; `domains` names the domain ids, in order.

    `sha256` covers tokens, document tables and tokenizer; `meta` is the content of `meta.json`.
    """

    path: Path
    train: Split
    val: Split
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    sha256: str
    meta: dict[str, Any]


def prepare(data: DataConfig, vocab_size: int, context: int, *, progress: bool = True) -> Corpus:
    """Open the prepared tokens of `data`, building them first if they are not in its cache.

    Raises UserError for unusable text, a tokenizer larger than `vocab_size`, splits not longer
    than `context` tokens, and a cache that cannot be written.
    """
    found = corpus.sources(data)
    folder = Path(os.path.expanduser(data.cache)) / _folder_name(data, vocab_size, found)
    prepared = _open_or_none(folder)
    if prepared is None:
        with _alone(folder):
            prepared = _open_or_remove(folder)  # another process may have built it meanwhile
            if prepared is None:
                with _writing(folder):
                    build(folder, data, vocab_size, context, found, progress)
                prepared = open_corpus(folder)
    tokenizers.check_fits(prepared.tokenizer, vocab_size)
    check_length(data, context, len(prepared.train), len(prepared.val))
    return prepared


def open_corpus(path: Path) -> Corpus:
    """Open a folder that `prepare` built. Raises UserError when it is missing or damaged."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no prepared tokens there; prepare the data first")
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        for name, size in meta["files"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} is not the {size} bytes that meta.json names")
        train, val = (_open_split(path, name) for name in SPLITS)
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        return Corpus(path, train, val, tokenizer, tuple(meta["domains"]), meta["sha256"], meta)
    except DAMAGE as error:
        raise UserError(
            f"{path}: damaged or incomplete tokens ({error}); delete that folder and prepare again"
        ) from error


def _open_split(path: Path, name: str) -> Split:
    tokens = np.load(path / f"{name}.npy", mmap_mode="r")
    table = np.load(path / f"{name}_documents.npy")
    return Split(tokens, *np.ascontiguousarray(table.T))


def _open_or_none(folder: Path) -> Corpus | None:
    with suppress(UserError):
        return open_corpus(folder)
    return None


def _open_or_remove(folder: Path) -> Corpus | None:
    """The corpus in the folder, if there is one; a damaged one is deleted with a warning."""
    if not folder.exists():
        return None
    try:
        return open_corpus(folder)
    except UserError as error:
        log.warning("%s; preparing it again", str(error).split("; delete")[0])
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - OURS:
        raise UserError(f"{folder}: in the way of prepared tokens and not ours; move it elsewhere")
    with suppress(OSError):  # another process may have moved it first
        shutil.rmtree(folder.rename(aside(folder)))
    return None


def _folder_name(data: DataConfig, vocab_size: int, found: corpus.Sources) -> str:
    """Readable start, then a hash of all that decides the tokens; no times, no paths."""
    kind: str = data.tokenizer
    decides: dict[str, Any] = {
        "format": FORMAT,
        "text": found.identity,
        "tokenizer": kind,
        "val_fraction": data.val_fraction,
    }
    if found.embedded:
        decides["bytes_per_domain"] = data.bytes_per_domain
    if kind == "bpe":
        decides |= {"vocab_size": vocab_size, "rustbpe": importlib.metadata.version("rustbpe")}
        kind += str(vocab_size)
    if kind == "file":
        decides["tokenizer_file"] = tokenizers.of_file(data).sha256
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    stem = "embedded"
    if data.files:
        stem = Path(os.path.abspath(os.path.expanduser(data.files[0]))).stem
    if found.hub:
        stem = found.hub.name
    readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:40]
    return f"{readable}-{kind}-{key}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time builds this folder; a second one waits, and then finds it built."""
    lock = folder.with_name(f".{folder.name}{LOCK}")
    with ExitStack() as stack:
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(lock, wait=False))
            except BlockingIOError:
                log.warning("%s: another process is preparing it; waiting for that", folder)
                stack.enter_context(locked(lock, wait=True))
        yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: prepared tokens cannot be written ({_reason(error)}); "
            "free some space or set data.cache=PATH"
        ) from error


def _reason(error: OSError) -> str:
    """NumPy tells of a full disk in bytes alone."""
    return error.strerror or f"the disk may be full: {error}"
