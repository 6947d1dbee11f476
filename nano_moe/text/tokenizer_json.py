"""A tokenizer.json of Hugging Face's, and what the files beside it say of where texts end.

What its ids stand for, `spelling.py` says. They are computed by the package `tokenizers`, which
comes with the extra `export`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nano_moe.errors import UserError
from nano_moe.text.spelling import Spelling, library, spelling

if TYPE_CHECKING:
    import tokenizers

FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


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
        backend = library().Tokenizer.from_str(json.dumps(saved))
    except Exception as error:  # the only kind that it raises
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"no tokenizer of the package tokenizers ({reason[:120]})") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


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
    backend.post_processor = library().processors.TemplateProcessing(
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
