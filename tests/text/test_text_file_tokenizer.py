"""A tokenizer.json of others: the same ids, every byte accounted for, and refusals by name."""

import json
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from foreign import STORY, STYLES, write
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text import store
from nano_moe.text.tokenizer import BPETokenizer, FileTokenizer, Tokenizer, of_file

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
OF_STORIES = st.lists(st.sampled_from([*"".join(STORY[:3]).split(), " ", "  ", "\n", "▁"])).map(
    "".join
)


@pytest.fixture(scope="session")
def styles(tmp_path_factory) -> dict[str, tuple[FileTokenizer, tokenizers.Tokenizer]]:
    """Of each style, ours and the file as its own package reads it."""
    found = {}
    for style in STYLES:
        path = write(style, tmp_path_factory.mktemp("style"))
        found[style] = (FileTokenizer.read(path), tokenizers.Tokenizer.from_file(str(path)))
    return found


def wanted(style: str, text: str) -> str:
    """What is left of a text, as its authors' pages say."""
    if style == "qwen":
        return unicodedata.normalize("NFC", text)
    if style.startswith(("metaspace", "llama 2")):
        text = text.replace("▁", " ")
    if style in ("metaspace", "metaspace, always"):
        text = text.removeprefix(" ")
    return text


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=40, deadline=None)
@given(text=ANY_TEXT | OF_STORIES)
@example(text="")
@example(text=" ")
@example(text="  two blanks first, two last  ")
@example(text="<s>x</s><unk><|endoftext|><|eot_id|><|im_end|><｜end▁of▁sentence｜>")
@example(text="<tool_call>f(x)</tool_call><｜User｜>hello        <0x0A>")
@example(text="𝄞🏳️‍🌈 مرحبا 漢字 e\u0301 \u212b")
def test_ids_are_theirs_and_spell_the_text(styles, style, text):
    ours, theirs = styles[style]
    ids = ours.encode(text)
    theirs.encode_special_tokens = True
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert not set(ids) & set(ours.special)
    assert ours.decode(ids) == ours.canonical(text) == wanted(style, text)
    assert ours.decode_bytes(ids) == ours.lead * bool(ids) + wanted(style, text).encode()
    assert b"".join(ours.decode_bytes([i]) for i in ids) == ours.decode_bytes(ids)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("style", STYLES)
def test_the_end_is_where_theirs_is(styles, style):
    ours, theirs = styles[style]
    begins = {"llama 3": "<|begin_of_text|>", "deepseek": "<｜begin▁of▁sentence｜>"}
    ends = {"llama 3": "<|end_of_text|>", "deepseek": "<｜end▁of▁sentence｜>"}
    other = "<|endoftext|>" if style in ("qwen", "neox") else None
    bos, eos = begins.get(style, other or "<s>"), ends.get(style, other or "</s>")
    assert ours.end_id == theirs.token_to_id(bos)
    assert ours.stop_ids[0] == theirs.token_to_id(eos)
    assert set(ours.stop_ids) == {theirs.token_to_id(bos), theirs.token_to_id(eos)}
    assert ours.n_vocab == theirs.get_vocab_size() and ours.decode(ours.stop_ids) == ""
    assert ours.decode_bytes([ours.n_vocab]) == "\ufffd".encode()


def test_batches_long_texts_and_half_surrogates(styles):
    for ours, _ in styles.values():
        texts = ["", *STORY[:3], "x"]
        batch = ours.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [ours.encode(text) for text in texts]
        assert all(ids.dtype == ours.dtype == np.uint16 for ids in batch)
        for text in ("x" + " " * 20_000 + "x", "a" * 10_000, "\n" * 10_000):
            assert ours.decode(ours.encode(text)) == text
        assert ours.decode(ours.encode("a\udcffb")) == "a\ufffdb"


@pytest.mark.parametrize("style", STYLES)
def test_saved_file_loads_as_the_same(styles, style, tmp_path):
    ours, _ = styles[style]
    ours.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = of_file(DataConfig(tokenizer="file", tokenizer_file=str(place)))
        assert again.pieces == ours.pieces and again.special == ours.special
        assert (again.end_id, again.stop_ids, again.lead) == (ours.end_id, ours.stop_ids, ours.lead)
        assert again.sha256 == ours.sha256
        assert again.encode("".join(STORY)) == ours.encode("".join(STORY))


def test_truncation_and_padding_of_a_file_are_not_ours(tmp_path):
    path = write("llama 3", tmp_path)
    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.save(str(path))
    ours = FileTokenizer.read(path)
    assert ours.decode(ours.encode(STORY[0])) == STORY[0]


def test_a_runs_own_tokenizer_serves_other_text(tmp_path):
    trained = BPETokenizer.train(STORY, 300)
    trained.save(tmp_path / "tokenizer.json")
    found = of_file(DataConfig(tokenizer="file", tokenizer_file=str(tmp_path)))
    assert (found.kind, found.pieces) == ("bpe", trained.pieces)


def changed(path, change):
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


def split_removed(saved):
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    saved["pre_tokenizer"]["pretokenizers"][0] = cut


def without_byte(saved):
    saved["model"]["vocab"] = {w: i for w, i in saved["model"]["vocab"].items() if w != "Ġ"}
    saved["model"]["merges"] = []


def swallowing(saved):
    saved["added_tokens"][-1] |= {"lstrip": True}


def added(saved):
    token = saved["added_tokens"][-1] | {"id": 420, "content": "[X]", "special": False}
    saved["added_tokens"].append(token)


LOSES = {
    "NFKC": ("qwen", lambda s: s.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
    "lower case": (
        "qwen",
        lambda s: s.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
        ),
        "normalizer Lowercase",
    ),
    "removed blanks": ("llama 3", split_removed, "pre-tokenizer Split"),
    "words alone": (
        "llama 2",
        lambda s: s.update(pre_tokenizer={"type": "WhitespaceSplit"}),
        "pre-tokenizer WhitespaceSplit",
    ),
    "a blank first": (
        "neox",
        lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
        "pre-tokenizer ByteLevel",
    ),
    "unigram": (
        "llama 2",
        lambda s: s.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}),
        "Unigram; BPE alone",
    ),
    "word pieces": (
        "llama 2",
        lambda s: s.update(
            model={
                **{"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"},
                **{"max_input_chars_per_word": 9, "continuing_subword_prefix": "##"},
            }
        ),
        "WordPiece; BPE alone",
    ),
    "dropout": ("llama 3", lambda s: s["model"].update(dropout=0.1), "dropout is 0.1"),
    "ends of words": (
        "llama 3",
        lambda s: s["model"].update(end_of_word_suffix="</w>"),
        "end_of_word_suffix is '</w>'",
    ),
    "no bytes": ("llama 2", lambda s: s["model"].update(byte_fallback=False), "byte_fallback"),
    "no blank": ("llama 3", without_byte, "no id for byte 0x20"),
    "a swallowing token": ("qwen", swallowing, "'<tool_call>' swallows"),
    "a blank after a token": ("llama 2", added, "a blank after its added token '\\[X\\]'"),
    "far ids": (
        "llama 3",
        lambda s: s["model"]["vocab"].update(Q1=1 << 24),
        "ids are not numbers",
    ),
    "ids of text": ("llama 3", lambda s: s["model"]["vocab"].update(x="1"), "no tokenizer of"),
    "no model": ("llama 3", lambda s: s.pop("model"), "Model missing"),
    "no merges": ("llama 3", lambda s: s["model"].pop("merges"), "tokenizer"),
    "merges of nothing": (
        "llama 3",
        lambda s: s["model"].update(merges=["Q1 Q2"]),
        "no tokenizer of the package",
    ),
    "a list": ("llama 3", lambda s: s.update(added_tokens=[1]), "expected struct"),
}


@pytest.mark.parametrize("style, change, part", LOSES.values(), ids=LOSES)
def test_files_that_lose_text_or_are_damaged_are_refused_by_name(tmp_path, style, change, part):
    path = write(style, tmp_path)
    changed(path, change)
    with pytest.raises(UserError, match=part) as refused:
        FileTokenizer.read(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model": {"type": "BPE"}}', "\x00"])
def test_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    data = DataConfig(tokenizer="file", tokenizer_file=str(tmp_path))
    with pytest.raises(UserError, match="tokenizer.json: ") as refused:
        of_file(data)
    assert "\n" not in str(refused.value)
    path.write_bytes(write("qwen", tmp_path).read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable fast tokenizer"):
        of_file(data)
    path.unlink()
    with pytest.raises(UserError, match="no such file; set data.tokenizer_file"):
        of_file(data)


def test_an_end_that_nothing_names(tmp_path):
    path, names = write("qwen", tmp_path), tmp_path / "tokenizer_config.json"
    names.unlink()
    with pytest.raises(UserError, match="nothing says which token ends a document"):
        FileTokenizer.read(path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [332, 330]}')
    assert FileTokenizer.read(path).stop_ids == (332, 330)
    names.write_text('{"eos_token": "<tool_call>"}')
    with pytest.raises(UserError, match="'<tool_call>' is to begin or end texts"):
        FileTokenizer.read(path)
    names.write_text('{"eos_token": "</nowhere>"}')
    with pytest.raises(UserError, match="'</nowhere>' is to begin or end texts"):
        FileTokenizer.read(path)
    names.write_text('{"eos_token": "<|im_end|>", "bos_token": "<b>", "add_bos_token": true}')
    with pytest.raises(UserError, match="names tokens that it does not have"):
        FileTokenizer.read(path)
    names.write_text("{")
    with pytest.raises(UserError, match="not a readable"):
        FileTokenizer.read(path)


def test_text_that_gets_a_special_id_is_refused(tmp_path):
    path = write("llama 3", tmp_path)

    def special(saved):
        token = {"id": saved["model"]["vocab"]["Ġfox"], "content": "Ġfox"}
        saved["added_tokens"].append(saved["added_tokens"][0] | token)

    changed(path, special)
    ours = FileTokenizer.read(path)
    assert ours.decode(ours.encode("a hen")) == "a hen"
    with pytest.raises(UserError, match="ids spell b'The old'... for the text 'The old fox'") as no:
        ours.encode("The old fox")
    assert "\n" not in str(no.value)


def test_the_package_that_computes_them_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = write("llama 3", tmp_path)
    FileTokenizer.read(path).save(tmp_path / "ours.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the package tokenizers.*\.\[export\]"):
        FileTokenizer.read(path)
    with pytest.raises(UserError, match=r"needs the package tokenizers.*\.\[export\]"):
        Tokenizer.load(tmp_path / "ours.json").encode("x")


@pytest.mark.parametrize("fields", [{"tokenizer": "file"}, {"tokenizer_file": "x"}])
def test_a_section_names_both_or_neither(fields):
    with pytest.raises(ValidationError, match="both tokenizer=file and tokenizer_file=PATH"):
        DataConfig(**fields)


@pytest.fixture
def prepared(tmp_path):
    """prepared(style, texts) -> those texts as documents, with that tokenizer."""

    def make(style: str, texts: list[str]) -> store.Corpus:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text, newline="")
        data = DataConfig(
            files=(str(folder),),
            tokenizer="file",
            tokenizer_file=str(write(style, tmp_path / "theirs")),
            val_fraction=0.4,
            cache=str(tmp_path / "cache"),
        )
        return store.prepare(data, 512, 4, progress=False)

    return make


@pytest.mark.parametrize("style", STYLES)
def test_a_corpus_counts_the_bytes_that_its_tokens_spell(prepared, style):
    texts = [f"{n} {text}" for n, text in enumerate([*STORY[:3], " e\u0301▁ x\n", "  y  z\n"] * 3)]
    corpus = prepared(style, texts)
    ours = corpus.tokenizer
    found = []
    for split in (corpus.train, corpus.val):
        ends = [*split.starts[1:], len(split)]
        for start, end, n_bytes in zip(split.starts, ends, split.n_bytes, strict=True):
            ids = split.tokens[start:end].tolist()
            assert ids.count(ours.end_id) == 1 and ids[-1] == ours.end_id
            found.append(ours.decode(ids[:-1]))
            assert n_bytes == len(found[-1].encode())
    assert sorted(found) == sorted(wanted(style, text) for text in texts)


def test_prepared_tokens_are_told_apart_by_what_the_file_holds(prepared, tmp_path):
    texts = [f"{n} {text}" for n, text in enumerate(STORY)]
    first = prepared("llama 3", texts)
    assert prepared("llama 3", texts).path == first.path
    other = prepared("qwen", texts)
    assert other.path != first.path and other.sha256 != first.sha256
    names = {"eos_token": "<|im_end|>"}
    path = tmp_path / "theirs" / "tokenizer.json"
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(names))
    data = DataConfig(tokenizer="file", tokenizer_file=str(path), files=(str(tmp_path / "texts"),))
    data = data.model_copy(update={"cache": str(tmp_path / "cache"), "val_fraction": 0.4})
    assert store.prepare(data, 512, 4, progress=False).path != other.path
    first.tokenizer.save(tmp_path / "ours.json")  # a run's copy makes the same tokens
    data = data.model_copy(update={"tokenizer_file": str(tmp_path / "ours.json")})
    assert store.prepare(data, 512, 4, progress=False).path == first.path
    with pytest.raises(UserError, match="file tokenizer needs 333 ids, model.vocab_size=300"):
        store.prepare(data, 300, 4, progress=False)
