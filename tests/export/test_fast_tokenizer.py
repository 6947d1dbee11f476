"""Our tokenizers as fast ones: the same ids for any text, and back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nano_moe.errors import UserError
from nano_moe.export.fast_tokenizer import UNKNOWN_NAME, fast_tokenizer, read
from nano_moe.export.pieces import END, merges_of
from nano_moe.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

NASTY = [
    "",
    " ",
    "a  b\n\n\tc \r\n d\x0b\x0c\x1c\x85\u2028e",
    "don't we'LL I'M 'tis ''s",
    "naïve café e\u0301 ﬁ ①²½ Ⅷ ſ K İ ß",
    "日本語のテキスト。한국어 العربية १२३ ٣٤",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 𝔘𝔫𝔦 𐍈 \U0010ffff",
    "\u00a0x\u2003y\u200bz\u3000\ufeff\ufffd\u0378\ue000",
    f"{END} and {UNKNOWN_NAME} are text",
    "\x00\x01\x7f\x80",
    "def f(x):\n    return x**2  # ok\n\n\n'''\"\"\"___--==",
    "a" * 3000 + " " * 500,
]


def texts() -> list[str]:
    """The nasty ones, and 200 of code points drawn from all planes."""
    rng = random.Random(0)
    ranges = [(32, 127), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    letters = [[chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)] for _ in range(200)]
    return NASTY + ["".join(text) + " \n" for text in letters]


KINDS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer.train(NASTY[:4]),
    "char with the replacement character": CharTokenizer.train(["ab\ufffd"]),
    "bpe": BPETokenizer.train(texts() + ["the cat and the hat are there " * 50], 400),
}
by_kind = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """loaded(tokenizer) -> what AutoTokenizer makes of its saved fast one, and its folder."""
    made = {}

    def load(tokenizer: Tokenizer):
        if tokenizer not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            fast_tokenizer(tokenizer, 1 << 20).save_pretrained(folder)
            made[tokenizer] = AutoTokenizer.from_pretrained(folder, local_files_only=True), folder
        return made[tokenizer]

    return load


@by_kind
def test_any_text_has_the_same_ids(tokenizer, loaded):
    fast, _ = loaded(tokenizer)
    for text in texts():
        ids = tokenizer.encode(text)
        assert fast.encode(text, add_special_tokens=False) == ids, repr(text)
        assert fast.encode(text) == [tokenizer.end_id, *ids], repr(text)


@settings(max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_drawn_text_has_the_same_ids(loaded, text):
    for tokenizer in KINDS.values():
        assert loaded(tokenizer)[0].encode(text)[1:] == tokenizer.encode(text)


@by_kind
def test_any_ids_are_the_same_text(tokenizer, loaded):
    fast, rng = loaded(tokenizer)[0], random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.n_vocab - 1) for _ in range(20)]
        assert fast.decode(ids) == tokenizer.decode(ids)
    assert fast.decode([*ids, tokenizer.end_id], skip_special_tokens=True) == tokenizer.decode(ids)


@by_kind
def test_the_end_token_begins_ends_and_pads(tokenizer, loaded):
    fast, _ = loaded(tokenizer)
    assert {fast.bos_token_id, fast.eos_token_id, fast.pad_token_id} == {tokenizer.end_id}
    assert len(fast) == tokenizer.n_vocab


@by_kind
def test_it_comes_back(tokenizer, loaded):
    found = read(loaded(tokenizer)[1] / "tokenizer.json")
    assert (found.kind, found.pieces) == (tokenizer.kind, tokenizer.pieces)


def test_a_piece_is_merged_from_what_better_merges_left():
    pieces = [b"a", b"b", b"c", b"bc", b"ab", b"abc"]
    assert merges_of(pieces) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]


def test_pieces_that_no_vocabulary_can_say_are_refused():
    with pytest.raises(UserError, match="two ids of the tokenizer stand for b'ab'"):
        fast_tokenizer(BPETokenizer("bpe", [b"a", b"b", b"ab", b"ab"]), 8)
    with pytest.raises(UserError, match="no merge of two others"):
        fast_tokenizer(BPETokenizer("bpe", [b"a", b"b", b"c", b"abc"]), 8)


def _lower(saved: dict) -> None:
    saved["normalizer"] = {"type": "Lowercase"}


def _other_words(saved: dict) -> None:
    saved["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            saved["pre_tokenizer"],
        ],
    }


def _prefix_space(saved: dict) -> None:
    saved["pre_tokenizer"]["add_prefix_space"] = True


def _second_special(saved: dict) -> None:
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": 401, "content": "<pad>"})


def _another_order(saved: dict) -> None:
    saved["model"]["merges"].reverse()


def _not_bytes(saved: dict) -> None:
    saved["pre_tokenizer"] = {"type": "Whitespace"}


def _unigram(saved: dict) -> None:
    saved["model"]["type"] = "Unigram"


@pytest.mark.parametrize(
    "spoil, part",
    [
        (_lower, "normalizes"),
        (_other_words, "splitting of words"),
        (_prefix_space, "splitting of words"),
        (_second_special, "2 special tokens"),
        (_another_order, "merges"),
        (_not_bytes, "byte-level"),
        (_unigram, "byte-level"),
    ],
)
def test_a_foreign_tokenizer_is_refused_by_name(loaded, tmp_path, spoil, part):
    saved = json.loads((loaded(KINDS["bpe"])[1] / "tokenizer.json").read_text())
    spoil(saved)
    path = Path(tmp_path / "tokenizer.json")
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"tokenizer.json: .*{part}"):
        read(path)


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UserError, match="not a readable fast tokenizer"):
        read(tmp_path / "tokenizer.json")
