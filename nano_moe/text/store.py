"""Prepared tokens on disk: one folder per corpus, opened without reading it all.

A folder holds, for each split, `<split>.npy` (all tokens; every document is followed by the end
token) and `<split>_documents.npy` (a row of first token, domain and UTF-8 bytes per document), and
besides `tokenizer.json`, `documents.tsv` (the same table to look at, with names) and `meta.json`.
It is built beside its place and renamed into it, so a folder under its final name is complete. Of
text that may be large, no more than a part is in memory at a time; what comes from the hub is gone
on with where a fault or a kill left it.
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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.files import locked, sync, write_text
from nano_moe.text import corpus, hub
from nano_moe.text import tokenizer as tokenizers
from nano_moe.text.shelf import Part, Shelf
from nano_moe.text.split import Document, cut_long
from nano_moe.text.tokenizer import Tokenizer
from nano_moe.text.writer import SplitWriter

log = logging.getLogger("nano_moe")

FORMAT = 1  # part of every folder's key; raise it when the same text would give other tokens
SPLITS = ("train", "val")
OURS = {"meta.json", "documents.tsv", "tokenizer.json", "train.npy", "val.npy"} | {
    f"{split}_documents.npy" for split in SPLITS
}
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError)
BATCH = 2_000_000  # bytes tokenized between two steps of the progress bar
NOTE_EVERY = 64_000_000  # bytes tokenized that a kill may cost
BEGUN, LOCK = ".begun", ".lock"


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
    stem = "embedded"
    if data.files:
        stem = Path(os.path.abspath(os.path.expanduser(data.files[0]))).stem
    if found.hub:
        stem = found.hub.name
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
    """Read, split, train the tokenizer, tokenize and write."""
    with (_kept if found.hub else _beside)(folder) as place:
        texts = _read(place, data, found, progress)
        tokenizer = _tokenizer(place, data, vocab_size, texts.splits["train"])
        with _bar("tokenizing", texts.n_bytes, progress) as bar:
            train = _write(place, "train", texts, tokenizer, 0, bar)
            val = _write(place, "val", texts, tokenizer, train["names"], bar)
        _check_length(data, context, train["tokens"], val["tokens"])
        summary = _summary(texts.domains, {"train": train, "val": val})
        commit = (place.noted("read") or {}).get("commit")
        _write_meta(place.tokens, data, tokenizer, summary, found, commit)


class Texts(NamedTuple):
    """All documents in the order of their tokens, each split to be walked any time."""

    splits: dict[str, Iterable[Document]]
    domains: list[str]
    n_bytes: int


def _read(place: Place, data: DataConfig, found: corpus.Sources, progress: bool) -> Texts:
    """Embedded text is small and held in memory, all other put on a shelf."""
    with _bar("reading", None, progress) as bar:
        if found.embedded:
            everything = []
            for document in corpus.documents(data, found):
                everything.append(document)
                bar.update(document.n_bytes)
            parts: Iterable[Iterable[Document]] = corpus.split(everything, data)
            domains = list(dict.fromkeys(document.domain for document in everything))
            n_bytes = sum(document.n_bytes for document in everything)
        else:
            shelf = _streamed(place, found.hub, bar) if found.hub else Shelf(place.texts)
            for document in corpus.documents(data, found) if found.files else ():
                shelf.put(document)
                bar.update(document.n_bytes)
            parts, domains = shelf.split(data.val_fraction), list(shelf.domains)
            n_bytes = shelf.n_bytes
    return Texts(dict(zip(SPLITS, parts, strict=True)), domains, n_bytes)


def _streamed(place: Place, found: hub.Found, bar: tqdm) -> Shelf:
    """The dataset's documents on a shelf; what is flushed is noted, and not read again."""
    noted = place.noted("read")
    shelf = Shelf(place.texts, noted["shelf"]) if noted else Shelf(place.texts)
    bar.update(shelf.n_bytes)
    if noted and noted["stream"] is None:
        return shelf
    stream = hub.Stream(found, noted["stream"] if noted else None)
    for document in stream:
        flushed = [shelf.put(piece) for piece in cut_long(document)]
        bar.update(document.n_bytes)
        if any(flushed):
            shelf.flush()
            place.note("read", {"shelf": shelf.kept(), "stream": stream.state})
    if shelf.n_documents == 0:
        raise UserError(f"data.hub: no text in {found.name}; raise data.hub.take_bytes, if given")
    shelf.flush()
    commit = stream.state["commit"]
    place.note("read", {"shelf": shelf.kept(), "stream": None, "commit": commit})
    return shelf


def _tokenizer(
    place: Place, data: DataConfig, vocab_size: int, train: Iterable[Document]
) -> Tokenizer:
    path = place.tokens / "tokenizer.json"
    if path.is_file():
        return Tokenizer.load(path)
    tokenizer = tokenizers.make(data, vocab_size, TextsOf(train))
    tokenizer.save(path)
    return tokenizer


class TextsOf:
    """The texts alone, to be walked any time."""

    def __init__(self, documents: Iterable[Document]):
        self.documents = documents

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.documents)


def _write(
    place: Place, name: str, texts: Texts, tokenizer: Tokenizer, names: int, bar: tqdm
) -> dict[str, Any]:
    """Tokenize what is left of a split; what the writer noted at its end.

    `names` is where its names begin in documents.tsv.
    """
    noted = place.noted(name) or {"names": names}
    bar.update(sum(n_bytes for n_bytes, *_ in noted.get("sums", ())))
    if "closed" in noted:
        return noted
    writer = SplitWriter(place.tokens, name, tokenizer, texts.domains, noted)
    since = 0
    for batch in _batches(_after(texts.splits[name], writer.n_documents)):
        writer.append(batch)
        n_bytes = sum(document.n_bytes for document in batch)
        bar.update(n_bytes)
        since += n_bytes
        if since >= NOTE_EVERY:
            place.note(name, writer.note())
            since = 0
    noted = {**writer.note(), "closed": True}
    writer.close()
    place.note(name, noted)
    return noted


def _summary(domains: list[str], noted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bytes, tokens and documents by domain and split."""
    return {
        domain: {
            name: dict(zip(("bytes", "tokens", "docs"), noted[name]["sums"][i], strict=True))
            for name in SPLITS
        }
        for i, domain in enumerate(domains)
    }


def _after(documents: Iterable[Document], n: int) -> Iterator[Document]:
    return documents.after(n) if isinstance(documents, Part) else islice(documents, n, None)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents of about BATCH bytes."""
    batch: list[Document] = []
    n_bytes = 0
    for document in documents:
        batch.append(document)
        n_bytes += document.n_bytes
        if n_bytes >= BATCH:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _write_meta(
    folder: Path,
    data: DataConfig,
    tokenizer: Tokenizer,
    summary: dict[str, dict[str, Any]],
    found: corpus.Sources,
    commit: str | None,
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
        **({"hub_commit": commit} if commit else {}),
        "domains": summary,
        "sha256": digest.hexdigest(),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Place:
    """Where a corpus is built: its tokens, the texts until then, and notes of how far it is."""

    folder: Path
    keeps: bool  # notes, to go on from after a fault

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def texts(self) -> Path:
        return self.folder / "texts"

    def noted(self, what: str) -> dict[str, Any] | None:
        path = self.folder / f"{what}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def note(self, what: str, found: dict[str, Any]) -> None:
        if self.keeps:
            write_text(self.folder / f"{what}.json", json.dumps(found))

    def finish(self, folder: Path) -> None:
        """The tokens become `folder`, unless another process was first."""
        for path in [*self.tokens.iterdir(), self.tokens]:
            sync(path)
        try:
            self.tokens.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)


@contextmanager
def _beside(folder: Path) -> Iterator[Place]:
    """A temporary place that becomes `folder` at the end, or never existed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    place = Place(_aside(folder), keeps=False)
    place.tokens.mkdir(parents=True)
    try:
        yield place
        place.finish(folder)
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


@contextmanager
def _kept(folder: Path) -> Iterator[Place]:
    """A place that stays after a fault or a kill, to go on from, and becomes `folder` at the end.

    It begins anew, with a warning, where what is noted is not there.
    """
    place = Place(folder.with_name(f".{folder.name}{BEGUN}"), keeps=True)
    place.tokens.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    except UserError:
        if not any(place.folder.glob("*.json")):  # nothing to go on from
            shutil.rmtree(place.folder, ignore_errors=True)
        raise
    except (ValueError, LookupError, TypeError, FileNotFoundError) as error:
        shutil.rmtree(place.folder, ignore_errors=True)
        raise UserError(
            f"{place.folder}: what was prepared so far is damaged ({error}) and was deleted; "
            "run the same again"
        ) from error
    place.finish(folder)
    shutil.rmtree(place.folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what a killed process left of this folder, once it is a day old."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if left.suffix in (BEGUN, LOCK):
            continue
        with suppress(OSError):  # another process may be done with it by now
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """A name beside the folder that no other process uses."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")


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
