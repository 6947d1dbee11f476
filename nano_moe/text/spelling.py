"""What the ids of a tokenizer.json of Hugging Face's stand for: bytes, or a refusal by name.

Two forms of BPE keep every byte of a text and are understood: of bytes, spelt as GPT-2 spells them
(Llama 3, Qwen, NeoX, DeepSeek), and of characters as in SentencePiece, with "▁" for a blank and
<0x0A> for a byte that no word has (Llama 2, Mixtral).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nano_moe.errors import UserError

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = (byte for byte in range(256) if byte not in PRINTABLE)
SPELLING = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(0x100 + place) for place, byte in enumerate(OTHERS)
}
BYTES = {character: byte for byte, character in SPELLING.items()}
BLANK = "▁"  # SentencePiece's
BYTE = re.compile("<0x([0-9A-F]{2})>")
MOST_IDS = 1 << 24
NOTHING = "\ufffd".encode()  # of ids that no text has


class Spelling(NamedTuple):
    """What ids stand for, and what a text is made into before it is cut.

    pieces: the bytes of each id, none for special tokens; special: their names.
    """

    pieces: list[bytes]
    special: dict[int, str]
    nfc: bool  # Unicode is composed first
    blanks: bool  # "▁" is read as a blank
    lead: bytes  # put before every text
    skips: bool  # but not before one that begins with it

    def canonical(self, text: str) -> str:
        """The text that its ids spell, without the lead."""
        if self.nfc:
            text = library().normalizers.NFC().normalize_str(text)
        if self.blanks:
            text = text.replace(BLANK, " ")
        return text.removeprefix(" ") if self.skips else text


def spelling(saved: dict[str, Any]) -> Spelling:
    """The bytes of a tokenizer.json's ids; raises UserError where it loses some of a text's."""
    cutters = list(flat(saved.get("pre_tokenizer")))
    of_bytes = any(part["type"] == "ByteLevel" for part in cutters)
    _check_model(saved["model"], of_bytes)
    changes = [_change(part, of_bytes) for part in flat(saved.get("normalizer"))]
    cuts = [_cut(part, of_bytes) for part in cutters]
    blanks = "blanks" in changes or any(cut.startswith("blanks") for cut in cuts)
    added = saved.get("added_tokens") or []
    _check_added(added, "lead" in changes or "blanks, lead" in cuts)
    leads = "lead" in changes or "blanks, lead" in cuts or "blanks, first lead" in cuts
    return Spelling(
        pieces=_pieces(saved["model"]["vocab"], added, of_bytes, blanks),
        special={token["id"]: token["content"] for token in added if token["special"]},
        nfc="nfc" in changes,
        blanks=blanks,
        lead=b" " if leads else b"",
        skips=leads and "lead" not in changes,
    )


def flat(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or of what cuts text, sequences opened."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part["pretokenizers"] if "pretokenizers" in part else part["normalizers"]:
        yield from flat(inner)


def _check_model(model: dict[str, Any], of_bytes: bool) -> None:
    """Every byte must have an id, and no id a mark of where words begin or end."""
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its model is {model['type']}; BPE alone is known here")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise UserError(f"its {field} is {model[field]!r}; only BPE without is known here")
    if of_bytes:
        missing = [byte for byte in range(256) if SPELLING[byte] not in model["vocab"]]
    elif model.get("byte_fallback"):
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    else:
        raise UserError("neither a byte-level BPE nor one with byte_fallback: some text has no ids")
    if missing:
        raise UserError(f"no id for byte {missing[0]:#04x}: some text has no ids")


def _change(part: dict[str, Any], of_bytes: bool) -> str:
    """What a normalizer does to text."""
    if part["type"] == "NFC":
        return "nfc"
    if not of_bytes and part["type"] == "Prepend" and part["prepend"] == BLANK:
        return "lead"
    if not of_bytes and part["type"] == "Replace":
        if (part["pattern"], part["content"]) == ({"String": " "}, BLANK):
            return "blanks"
    raise UserError(f"its normalizer {part['type']} changes text, so bytes could not be counted")


def _cut(part: dict[str, Any], of_bytes: bool) -> str:
    """What a pre-tokenizer does to text, besides cutting it."""
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return ""
    if kind in ("Split", "Punctuation") and part["behavior"] != "Removed":
        return ""
    if kind == "Digits":
        return ""
    if kind == "Metaspace" and not of_bytes and part["replacement"] == BLANK:
        leads = {"always": ", lead", "first": ", first lead", "never": ""}
        return f"blanks{leads[part['prepend_scheme']]}"
    raise UserError(f"its pre-tokenizer {kind} changes text, so bytes could not be counted")


def _check_added(added: list[dict[str, Any]], leads_each: bool) -> None:
    """Added tokens that text can hold must not take blanks with them, nor get any behind them."""
    for token in added:
        if token["special"]:
            continue
        if token["lstrip"] or token["rstrip"]:
            raise UserError(f"its added token {token['content']!r} swallows the blanks around it")
        if leads_each:
            raise UserError(
                f"it puts a blank after its added token {token['content']!r}, which no text holds"
            )


def _pieces(
    vocabulary: Mapping[str, int], added: list[dict[str, Any]], of_bytes: bool, blanks: bool
) -> list[bytes]:
    ids = [*vocabulary.values(), *(token["id"] for token in added)]
    if not all(isinstance(i, int) and 0 <= i < MOST_IDS for i in ids):
        raise UserError("its ids are not numbers from 0 on")
    pieces = [NOTHING] * (max(ids) + 1)
    for word, i in vocabulary.items():
        pieces[i] = _spelt_bytes(word) if of_bytes else _spelt_characters(word, blanks)
    for token in added:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    return pieces


def _spelt_bytes(word: str) -> bytes:
    return bytes(BYTES[c] for c in word) if all(c in BYTES for c in word) else NOTHING


def _spelt_characters(word: str, blanks: bool) -> bytes:
    byte = BYTE.fullmatch(word)
    if byte:
        return bytes([int(byte[1], 16)])
    return (word.replace(BLANK, " ") if blanks else word).encode()


def library() -> Any:
    """The package that computes ids; raises UserError where it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "this tokenizer needs the package tokenizers; install with: .venv/bin/python -m pip "
            "install --editable '.[export]'"
        ) from error
    return tokenizers
