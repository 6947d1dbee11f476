"""Our tokenizers as Hugging Face's fast ones, and back where both do the same.

Bytes are spelt as GPT-2 spells them: printable ones as themselves, the others as the characters
from U+0100 on (`text.spelling`). A tokenizer of a file goes out as that file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nano_moe.errors import UserError
from nano_moe.export.pieces import END, check_pieces, merges_of, spelt
from nano_moe.text.spelling import BYTES, flat
from nano_moe.text.tokenizer import (
    BROKEN,
    GPT2_SHA256,
    UNKNOWN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    Tokenizer,
)

UNKNOWN_NAME = "<|unknown|>"


def write(tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """What AutoTokenizer loads of a folder; raises UserError and OSError."""
    fast_tokenizer(tokenizer, context).save_pretrained(folder)
    if isinstance(tokenizer, FileTokenizer):  # which saving may have added to
        text = json.dumps(tokenizer.saved, ensure_ascii=False, indent=2)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def fast_tokenizer(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """The same ids for every text, with the end token before it as in `sample`; raises UserError.

    The end token begins, ends and pads; text that spells it is text all the same. That of a file
    does what its file says of both.
    """
    if isinstance(tokenizer, FileTokenizer):
        return _of_file(tokenizer, context)
    backend = _characters(tokenizer) if isinstance(tokenizer, CharTokenizer) else _bytes(tokenizer)
    end = tokenizers.AddedToken(END, special=True, normalized=False)
    backend.add_special_tokens([end])
    assert backend.token_to_id(END) == tokenizer.end_id
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.end_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _of_file(tokenizer: FileTokenizer, context: int) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.saved))
    end = tokenizer.special[tokenizer.end_id]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=backend.id_to_token(tokenizer.stop_ids[0]),
        pad_token=end,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _bytes(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    check_pieces(tokenizer)
    pieces = tokenizer.pieces[:-1]
    merges = [(spelt(one), spelt(other)) for one, other in merges_of(pieces)]
    vocabulary = {spelt(piece): i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words = isinstance(tokenizer, BPETokenizer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """Every code point a word; the unknown ones share a name of their own, decoded as U+FFFD."""
    vocabulary = {c: i for i, c in enumerate([*tokenizer.characters, UNKNOWN_NAME])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN_NAME))
    each = tokenizers.Regex(r"[\s\S]")
    backend.pre_tokenizer = pre_tokenizers.Split(each, "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(UNKNOWN_NAME, UNKNOWN), decoders.Fuse()])
    return backend


def read(path: Path) -> Tokenizer:
    """The tokenizer of ours that does what a tokenizer.json says; raises UserError."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = _of(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except BROKEN as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a readable fast tokenizer ({what[:120]})") from error
    return tokenizer


def _of(saved: dict[str, Any]) -> Tokenizer:
    model = saved["model"]
    if saved.get("normalizer") is not None:
        raise UserError("it normalizes text, and none of our tokenizers does")
    special = {token["id"] for token in saved.get("added_tokens", ())}
    pieces = {i: piece for piece, i in model["vocab"].items() if i not in special}
    if sorted(pieces) != list(range(len(pieces))) or special != {len(pieces)}:
        raise UserError(
            f"{len(special)} special tokens with ids {sorted(special)[:3]}; our tokenizers have "
            f"one, of the last id"
        )
    ordered = [pieces[i] for i in range(len(pieces))]
    if model["type"] == "WordLevel":
        return _char(saved, ordered)
    return _byte_level(saved, ordered)


def _char(saved: dict[str, Any], pieces: list[str]) -> Tokenizer:
    if pieces[-1] != UNKNOWN_NAME or any(len(piece) != 1 for piece in pieces[:-1]):
        raise UserError("its words are not single characters")
    return _equal(CharTokenizer("".join(pieces[:-1])), saved)


def _byte_level(saved: dict[str, Any], pieces: list[str]) -> Tokenizer:
    if saved["model"]["type"] != "BPE" or not _parts(saved, "pre_tokenizer", "ByteLevel"):
        raise UserError("not a byte-level BPE; ours are that, bytes or characters")
    ranks = [bytes(BYTES[c] for c in piece) for piece in pieces]
    words = any(p.get("use_regex", True) for p in _parts(saved, "pre_tokenizer", "ByteLevel"))
    if not saved["model"]["merges"] and not words:
        return _equal(ByteTokenizer(), saved)
    return _equal(BPETokenizer("gpt2" if _are_gpt2(ranks) else "bpe", ranks), saved)


def _are_gpt2(ranks: list[bytes]) -> bool:
    lines = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(ranks))
    return hashlib.sha256(b"".join(lines)).hexdigest() == GPT2_SHA256


def _equal(tokenizer: Tokenizer, saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer, where written anew it says the same of vocabulary, merges and words."""
    ours = json.loads(fast_tokenizer(tokenizer, 2).backend_tokenizer.to_str())
    for what, found, made in (
        ("vocabulary", _vocabulary(saved), _vocabulary(ours)),
        ("merges", _merges(saved), _merges(ours)),
        ("splitting of words", _splitting(saved), _splitting(ours)),
    ):
        if found != made:
            raise UserError(f"its {what} is not what a tokenizer of ours can do")
    return tokenizer


def _vocabulary(saved: dict[str, Any]) -> dict[str, int]:
    special = {token["content"] for token in saved["added_tokens"]}
    return {piece: i for piece, i in saved["model"]["vocab"].items() if piece not in special}


def _merges(saved: dict[str, Any]) -> list[tuple[str, ...]]:
    merges = saved["model"].get("merges", ())
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def _splitting(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """What cuts text into words; offsets are trimmed or not without changing ids."""
    parts = _parts(saved, "pre_tokenizer")
    return [{name: v for name, v in part.items() if name != "trim_offsets"} for part in parts]


def _parts(saved: dict[str, Any], role: str, kind: str | None = None) -> list[dict[str, Any]]:
    return [part for part in flat(saved.get(role)) if kind in (None, part["type"])]
