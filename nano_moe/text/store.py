"""Prepared tokens on disk: one folder per corpus, opened without reading it all.

A folder holds, for each split, `<split>.npy` (all tokens; every document is followed by the end
token) and `<split>_documents.npy` (a row of first token, domain and UTF-8 bytes per document), and
besides `tokenizer.json`, `documents.tsv` (the same table to look at, with names) and `meta.json`.
It is built beside its place and renamed into it, so a folder under its final name is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.files import locked, sync
from nano_moe.text import corpus
from nano_moe.text import tokenizer as tokenizers
from nano_moe.text.split import Document
from nano_moe.text.tokenizer import Tokenizer

log = logging.getLogger("nano_moe")

FORMAT = 1  # part of every folder's key; raise it when the same text would give other tokens
SPLITS = ("train", "val")
OURS = {"meta.json", "documents.tsv", "tokenizer.json", "train.npy", "val.npy"} | {
    f"{split}_documents.npy" for split in SPLITS
}
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError)
BATCH = 2_000_000  # bytes tokenized between two steps of the progress bar


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
                _build(folder, data, vocab_size, context, found, progress)
                prepared = open_corpus(folder)
    tokenizers.check_fits(prepared.tokenizer, vocab_size)
    _check_length(data, context, len(prepared.train), len(prepared.val))
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
        shutil.rmtree(folder.rename(_aside(folder)))
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
    stem = (
        Path(os.path.abspath(os.path.expanduser(data.files[0]))).stem if data.files else "embedded"
    )
    readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:40]
    return f"{readable}-{kind}-{key}"


def _build(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    context: int,
    found: corpus.Sources,
    progress: bool,
) -> None:
    """Read, split, train the tokenizer, tokenize and write; nothing is written before the end."""
    everything = _read_all(data, found, progress)
    domains = list(dict.fromkeys(document.domain for document in everything))
    splits = dict(zip(SPLITS, corpus.split(everything, data), strict=True))
    texts = [document.text for document in splits["train"]]
    tokenizer = tokenizers.make(data, vocab_size, texts)
    ids = _tokenize(tokenizer, splits, progress)
    _check_length(data, context, *(sum(map(len, ids[name])) for name in SPLITS))
    with _writing(folder), _beside(folder) as partial:
        tokenizer.save(partial / "tokenizer.json")
        summary: dict[str, dict[str, Any]] = {domain: {} for domain in domains}
        for name in SPLITS:
            table = _table(splits[name], ids[name], domains, tokenizer)
            np.save(partial / f"{name}.npy", np.concatenate(ids[name]))
            np.save(partial / f"{name}_documents.npy", table[:, :3])
            _summarize(summary, name, domains, table)
            _write_names(partial / "documents.tsv", name, splits[name], table)
        _write_meta(partial, data, tokenizer, summary, found)


def _read_all(data: DataConfig, found: corpus.Sources, progress: bool) -> list[Document]:
    everything = []
    with _bar("reading", None, progress) as bar:
        for document in corpus.documents(data, found):
            everything.append(document)
            bar.update(document.n_bytes)
    return everything


def _tokenize(
    tokenizer: Tokenizer, splits: dict[str, list[Document]], progress: bool
) -> dict[str, list[np.ndarray]]:
    """For each split, the ids of each document, end token included."""
    total = sum(document.n_bytes for part in splits.values() for document in part)
    end = np.array([tokenizer.end_id], tokenizer.dtype)
    ids: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    with _bar("tokenizing", total, progress) as bar:
        for name, part in splits.items():
            for batch, n_bytes in _batches(part):
                encoded = tokenizer.encode_batch(batch)
                ids[name] += [np.concatenate((one, end)) for one in encoded]
                bar.update(n_bytes)
    return ids


def _batches(documents: list[Document]) -> Iterator[tuple[list[str], int]]:
    """Consecutive texts of about BATCH bytes, with their bytes."""
    texts: list[str] = []
    n_bytes = 0
    for document in documents:
        texts.append(document.text)
        n_bytes += document.n_bytes
        if n_bytes >= BATCH:
            yield texts, n_bytes
            texts, n_bytes = [], 0
    if texts:
        yield texts, n_bytes


def _table(
    documents: list[Document], ids: list[np.ndarray], domains: list[str], tokenizer: Tokenizer
) -> np.ndarray:
    """(documents, 4) int64: first token, domain id, bytes, tokens."""
    lengths = np.array([len(one) for one in ids], np.int64)
    starts = np.cumsum(lengths) - lengths
    domain_ids = [domains.index(document.domain) for document in documents]
    spelt = (document._replace(text=tokenizer.canonical(document.text)) for document in documents)
    n_bytes = [document.n_bytes for document in spelt]
    return np.stack([starts, domain_ids, n_bytes, lengths], axis=1).astype(np.int64)


def _summarize(
    summary: dict[str, dict[str, Any]], split: str, domains: list[str], table: np.ndarray
) -> None:
    for i, domain in enumerate(domains):
        rows = table[table[:, 1] == i]
        summary[domain][split] = {
            "bytes": int(rows[:, 2].sum()),
            "tokens": int(rows[:, 3].sum()),
            "docs": len(rows),
        }


def _write_names(path: Path, split: str, documents: list[Document], table: np.ndarray) -> None:
    """Append one line per document; names are JSON strings, so a line stays a line."""
    with path.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write("split\tdomain\tfirst_token\tbytes\ttokens\tname\n")
        for document, (start, _, n_bytes, n_tokens) in zip(documents, table, strict=True):
            facts = (split, document.domain, start, n_bytes, n_tokens, json.dumps(document.name))
            file.write("\t".join(map(str, facts)) + "\n")


def _write_meta(
    folder: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    summary: dict[str, dict[str, Any]],
    found: corpus.Sources,
) -> None:
    """Write `meta.json`, the last file: what the tokens are, and the size and hash of the rest."""
    hashed = [f"{name}{part}.npy" for name in SPLITS for part in ("", "_documents")]
    digest = hashlib.sha256()
    for name in [*hashed, "tokenizer.json"]:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.kind,
        "n_vocab": tokenizer.n_vocab,
        "val_fraction": data.val_fraction,
        "text": found.identity,
        "domains": summary,
        "sha256": digest.hexdigest(),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, unless another process was first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial = _aside(folder)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what a killed process left of this folder, once it is a day old."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with suppress(OSError):  # another process may be done with it by now
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """A name beside the folder that no other process uses."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time builds this folder; a second one waits, and then finds it built."""
    lock = folder.with_name(f".{folder.name}.lock")
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


def _check_length(data: DataConfig, context: int, n_train: int, n_val: int) -> None:
    """Both splits must hold a window of `context` tokens and the token after it."""
    for name, n, remedy in (
        ("training", n_train, "give more text"),
        ("validation", n_val, f"raise data.val_fraction={data.val_fraction}, give more text"),
    ):
        if n <= context:
            raise UserError(
                f"the {name} split holds {n:,} tokens, model.context={context:,} needs at least "
                f"{context + 1:,}; {remedy}, or lower model.context"
            )


def _bar(what: str, total: int | None, progress: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress)
