"""Tokenizers: round trips over Unicode, the end token, training text only, files on disk."""

import base64
import codecs
import hashlib
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text import tokenizer as tokenizers
from nano_moe.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, make

END = "<|endoftext|>"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
STORY = "The old fox saw the young hen, and the hen saw the fox; they're 42 years apart.\n" * 50
LOSSLESS = {
    "byte": ByteTokenizer(),
    "bpe": BPETokenizer.train([STORY], 280),
    "gpt2": BPETokenizer("gpt2", BPETokenizer.train([STORY], 270).pieces[:-1]),
}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example(text=f"before {END} after\r\n\t \x00\ufeff")
@example(text="\ufeffmark first")
@example(text="𝄞🏳️‍🌈 مرحبا 漢字 e\u0301")
def test_round_trip(kind, text):
    tokenizer = LOSSLESS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.end_id not in ids
    assert all(0 <= i < tokenizer.n_vocab for i in ids)


@pytest.mark.parametrize("kind", [*LOSSLESS, "char"])
def test_every_character_of_unicode_comes_back(kind):
    text = "".join(chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000)
    tokenizer = LOSSLESS.get(kind) or CharTokenizer.train([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.lists(ANY_TEXT, max_size=5))
def test_batch_equals_one_by_one(texts):
    for tokenizer in [*LOSSLESS.values(), CharTokenizer.train([STORY])]:
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
        assert all(ids.dtype == tokenizer.dtype for ids in batch)


@settings(deadline=None)
@given(ANY_TEXT)
def test_streaming_decode_equals_whole(text):
    tokenizer = LOSSLESS["bpe"]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = tokenizer.encode(text)
    assert "".join(decoder.decode(tokenizer.decode_bytes([i])) for i in ids) == text


def test_end_token_is_last_and_silent():
    for tokenizer in [*LOSSLESS.values(), CharTokenizer.train([STORY])]:
        assert tokenizer.end_id == tokenizer.n_vocab - 1
        assert tokenizer.decode([tokenizer.end_id]) == ""
        assert tokenizer.decode([tokenizer.n_vocab + 5]) == "\ufffd"
    assert LOSSLESS["byte"].n_vocab == 257
    assert LOSSLESS["bpe"].n_vocab == 280


def test_long_texts_are_tokenized_as_if_whole(monkeypatch):
    breaks = ("\n", "\n\n", " \n", "\n  ", "\n\n\n\t")
    text = "".join(f"the hen{end}{i} foxes" for i in range(1000) for end in breaks)
    tokenizer = BPETokenizer.train([text], 300)
    assert b"\n\n" in tokenizer.pieces
    whole = tokenizer._encoding.encode_ordinary(text)
    monkeypatch.setattr(tokenizers, "SEGMENT", 300)
    assert len(tokenizers._segments(text)) > 200
    assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "a" * 300_000, "\n" * 300_000])
def test_long_runs_do_not_overflow_the_regex_engine(text):
    assert LOSSLESS["bpe"].decode(LOSSLESS["bpe"].encode(text)) == text


def test_half_surrogates_become_the_replacement_character():
    for tokenizer in LOSSLESS.values():
        assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_char_gives_unseen_text_the_unknown_id():
    tokenizer = CharTokenizer.train(["hello", "world"])
    assert tokenizer.n_vocab == len(set("helloworld")) + 2
    ids = tokenizer.encode("hero ☃")
    assert tokenizer.unknown_id == tokenizer.n_vocab - 2
    assert ids.count(tokenizer.unknown_id) == 2
    assert tokenizer.decode(ids) == "hero\ufffd\ufffd"


def test_bpe_learns_from_the_texts_it_is_given_only():
    word = "zyzzogeton "
    assert word.strip().encode() not in b"|".join(LOSSLESS["bpe"].pieces)
    taught = BPETokenizer.train([STORY + word * 500], 300)
    assert any(b"zyzzo" in piece for piece in taught.pieces)


def test_bpe_sample_is_spread_evenly(monkeypatch):
    texts = [f"{i} " * 1000 for i in range(200)]
    monkeypatch.setattr(tokenizers, "BPE_SAMPLE", sum(map(len, texts)) // 4)
    sample = list(tokenizers._sample(texts))
    assert 45 <= len(sample) <= 55
    assert {text.split()[0] for text in sample} & {"3", "199"}
    monkeypatch.setattr(tokenizers, "BPE_SAMPLE", 10**9)
    assert list(tokenizers._sample(texts)) == texts


def test_bpe_of_little_text_has_fewer_ids():
    tokenizer = BPETokenizer.train(["abc"], 4096)
    assert 257 <= tokenizer.n_vocab < 300
    assert tokenizer.decode(tokenizer.encode("abc déf")) == "abc déf"


@pytest.mark.parametrize(
    "tokenizer", [*LOSSLESS.values(), CharTokenizer.train([STORY])], ids=[*LOSSLESS, "char"]
)
def test_saved_file_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.pieces) == (tokenizer.kind, tokenizer.pieces)
    assert loaded.encode(STORY) == tokenizer.encode(STORY)
    header = json.loads((tmp_path / "tokenizer.json").read_text())
    assert header["n_vocab"] == tokenizer.n_vocab and header["end_id"] == tokenizer.end_id


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: "not json",
        lambda saved: json.dumps(saved | {"kind": "wordpiece"}),
        lambda saved: json.dumps(saved | {"format": 99}),
        lambda saved: json.dumps(saved | {"ranks": saved["ranks"][:-1]}),
        lambda saved: json.dumps(saved | {"ranks": [*saved["ranks"][:-1], "?"]}),
        lambda saved: json.dumps({"format": 1}),
        lambda saved: json.dumps(saved | {"ranks": saved["ranks"][:100], "n_vocab": 101}),
    ],
)
def test_damaged_file_is_a_user_error(damage, tmp_path):
    path = tmp_path / "tokenizer.json"
    LOSSLESS["bpe"].save(path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(UserError, match="not a readable tokenizer") as error:
        Tokenizer.load(path)
    assert str(path) in one_line(error)


def test_too_small_vocabularies_name_the_number():
    with pytest.raises(UserError) as error:
        make(DataConfig(files=("x",), tokenizer="byte"), 256, [])
    assert one_line(error) == (
        "byte tokenizer needs 257 ids, model.vocab_size=256; set model.vocab_size=264"
    )
    text = "".join(map(chr, range(300, 429)))
    with pytest.raises(UserError) as error:
        make(DataConfig(files=("x",), tokenizer="char"), 96, [text])
    assert one_line(error) == (
        "char tokenizer needs 131 ids, model.vocab_size=96; set model.vocab_size=136"
    )
    with pytest.raises(UserError, match="at least 257") as error:
        make(DataConfig(files=("x",)), 200, [STORY])
    one_line(error)


def gpt2(path) -> DataConfig:
    return DataConfig(files=("x",), tokenizer="gpt2", gpt2_ranks=str(path))


def test_gpt2_ranks_are_checked(tmp_path, monkeypatch):
    path = tmp_path / "r50k_base.tiktoken"
    with pytest.raises(UserError, match="cannot be read") as error:
        make(gpt2(path), 50304, [])
    assert str(path) in one_line(error)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    path.write_text("".join(lines[:200]))
    with pytest.raises(UserError, match="sha256 .* and 200 ranks") as error:
        make(gpt2(path), 50304, [])
    assert "50,256" in one_line(error)
    path.write_text("".join(lines))
    monkeypatch.setattr(tokenizers, "GPT2_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    tokenizer = make(gpt2(path), 50304, [])
    assert tokenizer.encode("hi") == list(b"hi") and tokenizer.end_id == 256


def test_dtype_is_the_smallest_that_fits():
    assert LOSSLESS["bpe"].dtype is np.uint16
    assert BPETokenizer("bpe", [str(i).encode() for i in range(65_535)]).dtype is np.uint16
    assert BPETokenizer("bpe", [str(i).encode() for i in range(65_536)]).dtype is np.uint32
