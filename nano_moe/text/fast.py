"""A tokenizer.json of Hugging Face's, read for the bytes that its ids stand for.

Two forms of BPE keep every byte of a text and are understood: of bytes, spelt as GPT-2 spells them
(Llama 3, Qwen, NeoX, DeepSeek), and of characters as in SentencePiece, with "▁" for a blank and
<0x0A> for a byte that no word has (Llama 2, Mixtral). All else is refused by name. What computes
ids is the package `tokenizers`, which comes with the extra `export`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nano_moe.errors import UserError

if TYPE_CHECKING:
    import tokenizers

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
FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


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
            text = _library().normalizers.NFC().normalize_str(text)
        if self.blanks:
            text = text.replace(BLANK, " ")
        return text.removeprefix(" ") if self.skips else text


class Found(NamedTuple):
    """A tokenizer.json, the id between documents, and all that end a text, eos first."""

    saved: dict[str, Any]
    end_id: int
    stop_ids: list[int]


def read(path: Path) -> Found:
    """A tokenizer.json, with what the files beside it say of its tokens; raises UserError."""
    try:
        backend = backend_of(json.loads(path.read_text(encoding="utf-8")))
        names = _beside(path, "special_tokens_map.json") | _beside(path, "tokenizer_config.json")
        _put_around(backend, names)
        saved = json.loads(backend.to_str())  # with the ids that are really given to added tokens
        return Found(saved, *_ends(backend, spelling(saved), names, _eos_ids(path)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FAULTS as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not a readable fast tokenizer ({what[:120]})") from error


def backend_of(saved: dict[str, Any]) -> tokenizers.Tokenizer:
    """What computes ids: of whole texts, in which special tokens are text; raises UserError."""
    try:
        backend = _library().Tokenizer.from_str(json.dumps(saved))
    except Exception as error:  # the only kind that it raises
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"no tokenizer of the package tokenizers ({reason[:120]})") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


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


def _beside(path: Path, name: str) -> dict[str, Any]:
    """What a file beside the tokenizer says; nothing where there is none."""
    file = path.with_name(name)
    if not file.is_file():
        return {}
    said = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(said, dict):
        raise UserError(f"{name} beside it is no mapping")
    return said


def _named(names: Mapping[str, Any], role: str) -> str | None:
    token = names.get(role)
    return token["content"] if isinstance(token, dict) else token


def _eos_ids(path: Path) -> list[int]:
    """What the model's own files say ends a text."""
    said = _beside(path, "config.json") | _beside(path, "generation_config.json")
    ids = said.get("eos_token_id")
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _put_around(backend: tokenizers.Tokenizer, names: Mapping[str, Any]) -> None:
    """Where add_bos_token says so, bos before every text or nothing, as transformers does."""
    if not isinstance(names.get("add_bos_token"), bool):
        return
    bos = _named(names, "bos_token") if names["add_bos_token"] else None
    eos = _named(names, "eos_token") if names.get("add_eos_token") is True else None
    single = " ".join([*([bos] if bos else []), "$A", *([eos] if eos else [])])
    tokens = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    if any(i is None for _, i in tokens):
        raise UserError("tokenizer_config.json beside it names tokens that it does not have")
    backend.post_processor = _library().processors.TemplateProcessing(
        single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=tokens
    )


def _ends(
    backend: tokenizers.Tokenizer, spelt: Spelling, names: Mapping[str, Any], eos_ids: list[int]
) -> tuple[int, list[int]]:
    """The id between documents, and all that end a text, eos first."""
    before = _put_before(backend)
    eos = _named(names, "eos_token")
    ends = eos_ids if eos is None else [backend.token_to_id(eos), *eos_ids]
    for i in (*before, *ends[:1]):
        if i not in spelt.special:
            token = eos if i is None else backend.id_to_token(i)
            raise UserError(f"{token!r} is to begin or end texts and is none of its special tokens")
    known = [i for i in dict.fromkeys([*ends, *before[-1:]]) if i in range(len(spelt.pieces))]
    if not known:
        raise UserError(
            "nothing says which token ends a document; name it, as eos_token, in a "
            "tokenizer_config.json beside it"
        )
    return (before[-1] if before else known[0]), known


def _put_before(backend: tokenizers.Tokenizer) -> list[int]:
    """The ids that the post-processor puts before a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    return whole[: _place(whole, bare)]


def _place(whole: list[int], part: list[int]) -> int:
    return next((i for i in range(len(whole)) if whole[i : i + len(part)] == part), 0)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "this tokenizer needs the package tokenizers; install with: .venv/bin/python -m pip "
            "install --editable '.[export]'"
        ) from error
    return tokenizers
