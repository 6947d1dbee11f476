"""A corpus is built: text read, split, put in order, its tokenizer trained, its tokens written.

Of text that may be large, no more than a part is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text import corpus, hub, place
from nano_moe.text import tokenizer as tokenizers
from nano_moe.text.place import Place
from nano_moe.text.shelf import Part, Shelf
from nano_moe.text.split import Document, cut_long
from nano_moe.text.tokenizer import Tokenizer
from nano_moe.text.writer import SplitWriter

FORMAT = 1  # part of every folder's key; raise it when the same text would give other tokens
SPLITS = ("train", "val")
BATCH = 2_000_000  # bytes tokenized between two steps of the progress bar
NOTE_EVERY = 64_000_000  # bytes tokenized that a kill may cost


def build(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    context: int,
    found: corpus.Sources,
    progress: bool,
) -> None:
    """Read, split, train the tokenizer, tokenize and write."""
    with (place.kept if found.hub else place.beside)(folder) as here:
        texts = _read(here, data, found, progress)
        tokenizer = _tokenizer(here, data, vocab_size, texts.splits["train"])
        with _bar("tokenizing", texts.n_bytes, progress) as bar:
            train = _write(here, "train", texts, tokenizer, 0, bar)
            val = _write(here, "val", texts, tokenizer, train["names"], bar)
        check_length(data, context, train["tokens"], val["tokens"])
        summary = _summary(texts.domains, {"train": train, "val": val})
        commit = (here.noted("read") or {}).get("commit")
        _write_meta(here.tokens, data, tokenizer, summary, found, commit)


class Texts(NamedTuple):
    """All documents in the order of their tokens, each split to be walked any time."""

    splits: dict[str, Iterable[Document]]
    domains: list[str]
    n_bytes: int


def _read(here: Place, data: DataConfig, found: corpus.Sources, progress: bool) -> Texts:
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
            shelf = _streamed(here, found.hub, bar) if found.hub else Shelf(here.texts)
            for document in corpus.documents(data, found) if found.files else ():
                shelf.put(document)
                bar.update(document.n_bytes)
            parts, domains = shelf.split(data.val_fraction), list(shelf.domains)
            n_bytes = shelf.n_bytes
    return Texts(dict(zip(SPLITS, parts, strict=True)), domains, n_bytes)


def _streamed(here: Place, found: hub.Found, bar: tqdm) -> Shelf:
    """The dataset's documents on a shelf; what is flushed is noted, and not read again."""
    noted = here.noted("read")
    shelf = Shelf(here.texts, noted["shelf"]) if noted else Shelf(here.texts)
    bar.update(shelf.n_bytes)
    if noted and noted["stream"] is None:
        return shelf
    stream = hub.Stream(found, noted["stream"] if noted else None)
    for document in stream:
        flushed = [shelf.put(piece) for piece in cut_long(document)]
        bar.update(document.n_bytes)
        if any(flushed):
            shelf.flush()
            here.note("read", {"shelf": shelf.kept(), "stream": stream.state})
    if shelf.n_documents == 0:
        raise UserError(f"data.hub: no text in {found.name}; raise data.hub.take_bytes, if given")
    shelf.flush()
    commit = stream.state["commit"]
    here.note("read", {"shelf": shelf.kept(), "stream": None, "commit": commit})
    return shelf


def _tokenizer(
    here: Place, data: DataConfig, vocab_size: int, train: Iterable[Document]
) -> Tokenizer:
    path = here.tokens / "tokenizer.json"
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
    here: Place, name: str, texts: Texts, tokenizer: Tokenizer, names: int, bar: tqdm
) -> dict[str, Any]:
    """Tokenize what is left of a split; what the writer noted at its end.

    `names` is where its names begin in documents.tsv.
    """
    noted = here.noted(name) or {"names": names}
    bar.update(sum(n_bytes for n_bytes, *_ in noted.get("sums", ())))
    if "closed" in noted:
        return noted
    since = 0
    with SplitWriter(here.tokens, name, tokenizer, texts.domains, noted) as writer:
        for batch in _batches(_after(texts.splits[name], writer.n_documents)):
            writer.append(batch)
            n_bytes = sum(document.n_bytes for document in batch)
            bar.update(n_bytes)
            since += n_bytes
            if since >= NOTE_EVERY:
                here.note(name, writer.note())
                since = 0
        noted = {**writer.note(), "closed": True}
    here.note(name, noted)
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


def check_length(data: DataConfig, context: int, n_train: int, n_val: int) -> None:
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
