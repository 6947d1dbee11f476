"""Tokenizers: bytes, characters, a BPE of our own, GPT-2's BPE, or a tokenizer.json of others.

Each is a list of byte strings, one per id, and a way to turn text into ids. The end token stands
before and after every document; like other special tokens it stands for no bytes, and no text
encodes to it. In our own kinds it is the last id in use.
"""

from __future__ import annotations

import abc
import base64
import binascii
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.files import write_text
from nano_moe.text import tokenizer_json
from nano_moe.text.spelling import spelling

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Tokenizers

# GPT-2's rule for where words end; merges never cross it.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_RANKS = 50_256
BPE_SAMPLE = 20_000_000  # bytes of training text that merges are counted on, at most
SEGMENT = 1 << 16  # characters handed to the regex engine at once; its stack is finite
UNKNOWN = "\ufffd"
FORMAT = 1
BROKEN = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError),
    RecursionError,
)


class Tokenizer(abc.ABC):
    """What all kinds share: the table of byte strings and everything that only reads it.

    end_id: stands before and after every document; stop_ids: end a text that a model writes;
    special: names of the ids that stand for no bytes; lead: put before every text's own bytes.
    """

    kind: str
    lead = b""

    def __init__(self, pieces: list[bytes], end_id: int, special: Mapping[int, str]):
        self.pieces, self.end_id, self.special = pieces, end_id, special
        self.stop_ids: tuple[int, ...] = (end_id,)

    @property
    def n_vocab(self) -> int:
        """Ids in use, special ones included."""
        return len(self.pieces)

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that `encode_batch` and the token files hold ids in."""
        return np.uint16 if self.n_vocab <= 1 << 16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """The ids of a text; never a special token, whatever the text says."""
        return self.encode_batch([text])[0].tolist()

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, as arrays of `dtype`."""

    def canonical(self, text: str) -> str:
        """The text that its ids spell, and whose bytes count: the same, unless a kind says more."""
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of the ids, which may end inside a character.

        Special tokens give none; an id that is not in use gives the replacement character.
        """
        pieces, n = self.pieces, self.n_vocab
        return b"".join(pieces[i] if 0 <= i < n else UNKNOWN.encode() for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a document's ids; bytes that form no character become the replacement one."""
        return self.decode_bytes(ids).removeprefix(self.lead).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write one JSON file that `load` reads back. Raises OSError when it cannot be written."""
        write_text(Path(path), self._saved())

    @property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(self._saved().encode()).hexdigest()

    def _saved(self) -> str:
        header = {"format": FORMAT, "kind": self.kind, "n_vocab": self.n_vocab}
        return json.dumps(header | {"end_id": self.end_id} | self._table(), indent=0) + "\n"

    def _table(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """The tokenizer that `save` wrote. Raises UserError when the file is missing or damaged."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
            tokenizer = _restore(saved)
            if tokenizer.n_vocab != saved["n_vocab"]:
                raise ValueError(f"{tokenizer.n_vocab} ids, the header says {saved['n_vocab']}")
        except BROKEN as error:
            raise UserError(
                f"{path}: not a readable tokenizer ({type(error).__name__}: {error}); "
                "prepare the data again, or restore the file"
            ) from error
        return tokenizer


class ByteTokenizer(Tokenizer):
    """Id = byte."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__(*_ended([bytes([i]) for i in range(256)]))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(_encodable(t).encode(), np.uint8).astype(self.dtype) for t in texts]


class CharTokenizer(Tokenizer):
    """Id = place among the sorted characters; all others share one unknown id after them."""

    kind = "char"

    def __init__(self, characters: str):
        super().__init__(*_ended([*(c.encode() for c in characters), UNKNOWN.encode()]))
        self.characters = characters
        self.unknown_id = len(characters)

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        """The characters that occur in the texts."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls("".join(sorted(characters)))

    @cached_property
    def _ids(self) -> np.ndarray:
        """Unicode code point -> id."""
        table = np.full(0x110000, self.unknown_id, self.dtype)
        table[_code_points(self.characters)] = np.arange(len(self.characters))
        return table

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._ids[_code_points(_encodable(text))] for text in texts]

    def _table(self) -> dict[str, Any]:
        return {"characters": self.characters}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding; an id is the rank of its merge."""

    def __init__(self, kind: str, ranks: Sequence[bytes]):
        super().__init__(*_ended(ranks))
        self.kind = kind

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Merges learned from the texts, for `vocab_size` ids with the end token, or fewer.

        Raises UserError when `vocab_size` has no room for the 256 bytes.
        """
        if vocab_size < 257:
            raise UserError(
                f"data.tokenizer: bpe needs at least 257 ids, model.vocab_size={vocab_size}; "
                "set model.vocab_size=264 or more, or data.tokenizer=char"
            )
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda rank: rank[1])
        return cls("bpe", [bytes(piece) for piece, _ in ranks])

    @classmethod
    def gpt2(cls, path: Path) -> BPETokenizer:
        """GPT-2's merges from a file of base64 ranks. Raises UserError unless it is that file."""
        remedy = "point data.gpt2_ranks at an intact r50k_base.tiktoken"
        try:
            if path.exists() and not path.is_file():
                raise OSError(0, "not a file")
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
        digest = hashlib.sha256(raw).hexdigest()
        if digest != GPT2_SHA256:
            lines = raw.count(b"\n")
            raise UserError(
                f"{path}: sha256 {digest[:12]}... and {lines:,} ranks, GPT-2's are "
                f"{GPT2_SHA256[:12]}... and {GPT2_RANKS:,}; {remedy}"
            )
        return cls("gpt2", [base64.b64decode(line.split()[0]) for line in raw.splitlines()])

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            f"nano_moe_{self.kind}",
            pat_str=PATTERN,
            mergeable_ranks={piece: i for i, piece in enumerate(self.pieces[:-1])},
            special_tokens={},
        )

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        segments = [_segments(_encodable(text)) for text in texts]
        flat = [segment for parts in segments for segment in parts]
        ids = iter(self._encoding.encode_ordinary_batch(flat, num_threads=2))
        return [
            np.concatenate([np.array(next(ids), self.dtype) for _ in parts]) for parts in segments
        ]

    def _table(self) -> dict[str, Any]:
        ranks = [base64.b64encode(piece).decode() for piece in self.pieces[:-1]]
        return {"pattern": PATTERN, "ranks": ranks}


class FileTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's, held as it is: the same ids for every text.

    The end token is the bos token where theirs puts one before a text (the last one, if several),
    else the eos token. A model that knows bos as what begins documents was not taught to say it
    where one ends, so its loss there is high; bytes have none of that.

    The ids spell `lead` and `canonical(text)`: with Unicode composed where theirs composes it
    (NFC); where it marks blanks by "▁", with "▁" itself read as a blank, and a blank as lead that
    is none of the text's bytes. Raises UserError for a file that loses more than that.
    """

    kind = "file"

    def __init__(self, saved: dict[str, Any], end_id: int, stop_ids: Sequence[int]):
        self.saved, self._spelling = saved, spelling(saved)
        super().__init__(self._spelling.pieces, end_id, self._spelling.special)
        if self.special.get(end_id) is None or not all(0 <= i < self.n_vocab for i in stop_ids):
            raise ValueError(f"end token {end_id} is none of its special tokens")
        self.lead, self.stop_ids = self._spelling.lead, tuple(stop_ids)

    @classmethod
    def read(cls, path: Path) -> FileTokenizer:
        """The tokenizer of a tokenizer.json and of what lies beside it."""
        return cls(*tokenizer_json.read(path))

    @cached_property
    def backend(self) -> Tokenizers:
        return tokenizer_json.backend_of(self.saved)

    def canonical(self, text: str) -> str:
        return self._spelling.canonical(_encodable(text))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text. Raises UserError for one that they do not spell."""
        texts = [_encodable(text) for text in texts]
        found = [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            self._check(text, ids)
        return [np.array(ids, self.dtype) for ids in found]

    def _check(self, text: str, ids: list[int]) -> None:
        spelt = b"".join([self.pieces[i] for i in ids])
        if spelt != self.lead * bool(text) + self.canonical(text).encode():
            raise UserError(
                f"the tokenizer's ids spell {spelt[:40]!r}... for the text {text[:40]!r}...; "
                "leave that text out, or choose another data.tokenizer"
            )

    def _table(self) -> dict[str, Any]:
        return {"stop_ids": list(self.stop_ids), "tokenizer": self.saved}


def make(data: DataConfig, vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data` asks for; `texts`, the training split alone, is walked twice.

    Raises UserError when it has more ids than `vocab_size`.
    """
    tokenizer: Tokenizer
    if data.tokenizer == "byte":
        tokenizer = ByteTokenizer()
    elif data.tokenizer == "char":
        tokenizer = CharTokenizer.train(texts)
    elif data.tokenizer == "gpt2":
        assert data.gpt2_ranks is not None
        tokenizer = BPETokenizer.gpt2(Path(os.path.expanduser(data.gpt2_ranks)))
    elif data.tokenizer == "file":
        tokenizer = of_file(data)
    else:
        tokenizer = BPETokenizer.train(_sample(texts), vocab_size)
    check_fits(tokenizer, vocab_size)
    return tokenizer


def of_file(data: DataConfig) -> Tokenizer:
    """What `data.tokenizer_file` names: a run's tokenizer.json, or one of Hugging Face's.

    A folder stands for the file in it. Raises UserError where it is missing or damaged, and for
    one that loses text.
    """
    assert data.tokenizer_file is not None
    path = Path(os.path.expanduser(data.tokenizer_file))
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; set data.tokenizer_file to a tokenizer.json or its folder"
        )
    try:
        is_ours = "kind" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        is_ours = False  # what is wrong is said below
    if is_ours:
        return Tokenizer.load(path)
    return FileTokenizer.read(path)


def load_for(path: Path, vocab_size: int) -> Tokenizer:
    """A run's own, for its model; raises UserError where it is missing, damaged or of another."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"{path}: {tokenizer.n_vocab} ids, and the run's model has {vocab_size}; restore the "
            "file, this one is of another run"
        )
    return tokenizer


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError when the tokenizer's ids exceed the model's vocabulary."""
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"{tokenizer.kind} tokenizer needs {tokenizer.n_vocab} ids, model.vocab_size="
            f"{vocab_size}; set model.vocab_size={-(-tokenizer.n_vocab // 8) * 8}"
        )


def _restore(saved: dict[str, Any]) -> Tokenizer:
    kind = saved["kind"]
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer(saved["characters"])
    if kind == "file":
        return FileTokenizer(saved["tokenizer"], saved["end_id"], saved["stop_ids"])
    if kind not in ("bpe", "gpt2"):
        raise ValueError(f"kind {kind!r}")
    if saved["pattern"] != PATTERN:
        raise ValueError("another word pattern than this version's")
    try:
        ranks = [base64.b64decode(r, validate=True) for r in saved["ranks"]]
    except binascii.Error as error:
        raise ValueError(f"a rank is not base64: {error}") from error
    missing = {bytes([byte]) for byte in range(256)}.difference(ranks)
    if missing:  # tiktoken would panic at a text that holds one
        raise ValueError(f"{len(missing)} of the 256 bytes have no id")
    return BPETokenizer(kind, ranks)


def _ended(pieces: Sequence[bytes]) -> tuple[list[bytes], int, dict[int, str]]:
    """The pieces with an end token, its id, and its name."""
    return [*pieces, b""], len(pieces), {len(pieces): "end"}


def _sample(texts: Iterable[str]) -> Iterable[str]:
    """Segments of the texts, evenly spaced so that they hold about BPE_SAMPLE characters."""
    share = min(1.0, BPE_SAMPLE / max(1, sum(len(text) for text in texts)))
    segments = (segment for text in texts for segment in _segments(text))
    return (s for i, s in enumerate(segments) if int((i + 1) * share) > int(i * share))


def _segments(text: str) -> list[str]:
    """The text in parts of at most SEGMENT characters, cut where no word is where one can."""
    parts = []
    start = 0
    while len(text) - start > SEGMENT:
        end = text.rfind("\n", start + SEGMENT // 2, start + SEGMENT) + 1
        while end > 0 and (text[end - 2].isspace() or text[end].isspace()):
            end = text.rfind("\n", start + SEGMENT // 2, end - 1) + 1
        end = end or start + SEGMENT
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _encodable(text: str) -> str:
    """The text with the replacement character for halves of surrogate pairs (bytes of argv)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
