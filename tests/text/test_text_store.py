"""Prepared tokens: exact bytes, the cache's key, faults that leave nothing behind, two at once."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text import building, store
from nano_moe.text.store import open_corpus, prepare
from nano_moe.text.windows import EvalWindows
from nano_moe.text.writer import Growing

WORDS = "le vieux renard 漢字 voyait la poule — and the hen saw 🦊 the fox".split()


def book(seed: int, n_words: int = 400) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, n_words)) + f"\nend of book {seed}\n"


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    for i in range(12):
        path = folder / ("tales" if i % 3 else "essays") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(book(i))
    return folder


@pytest.fixture
def data(shelf, tmp_path):
    return DataConfig(
        files=(str(shelf),), tokenizer="byte", val_fraction=0.2, cache=str(tmp_path / "cache")
    )


def ready(data: DataConfig, vocab_size: int = 512, context: int = 32) -> store.Corpus:
    return prepare(data, vocab_size, context, progress=False)


def fault(data: DataConfig, vocab_size: int = 512, context: int = 32) -> str:
    with pytest.raises(UserError) as error:
        ready(data, vocab_size, context)
    assert "\n" not in str(error.value)
    return str(error.value)


def left_in(data: DataConfig) -> list[str]:
    return sorted(os.listdir(data.cache)) if os.path.isdir(data.cache) else []


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_documents_come_back_byte_for_byte(data, shelf, kind):
    corpus = ready(data.model_copy(update={"tokenizer": kind}))
    texts = {}
    for split in (corpus.train, corpus.val):
        ends = [*split.starts[1:], len(split)]
        for start, end, domain, n_bytes in zip(
            split.starts, ends, split.domain_ids, split.n_bytes, strict=True
        ):
            assert split.tokens[end - 1] == corpus.tokenizer.end_id
            text = corpus.tokenizer.decode(split.tokens[start : end - 1])
            if kind == "char":  # a character of validation may be unknown
                assert len(text.encode()) <= n_bytes * 3
                continue
            assert len(text.encode()) == n_bytes
            texts[text] = corpus.domains[domain]
    files = {path.read_text(): path.parent.name for path in shelf.rglob("*.txt")}
    assert texts == files or kind == "char"
    total = corpus.train.n_bytes.sum() + corpus.val.n_bytes.sum()
    assert total == sum(path.stat().st_size for path in shelf.rglob("*.txt"))
    assert 0 < corpus.val.n_bytes.sum() / total < 0.3


def test_evaluation_sees_every_token_and_byte_of_each_domain(data):
    corpus = ready(data)
    windows = EvalWindows(corpus.val, 32, corpus.tokenizer.end_id)
    for i, domain in enumerate(corpus.domains):
        ids = np.concatenate([t[d == i] for _, t, d in windows])
        known = corpus.meta["domains"][domain]["val"]
        assert len(ids) == known["tokens"]
        assert len(corpus.tokenizer.decode_bytes(ids)) == known["bytes"]
        assert np.sum(corpus.val.domain_ids == i) == known["docs"]


def test_lone_file_is_split_from_its_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(2000))
    (tmp_path / "one.txt").write_text(text)
    data = DataConfig(files=str(tmp_path / "one.txt"), tokenizer="char", cache=str(tmp_path / "c"))
    corpus = ready(data)
    train, val = (corpus.tokenizer.decode(s.tokens) for s in (corpus.train, corpus.val))
    assert train + val == text and val.startswith("line")
    assert 0.04 < len(val) / len(text) < 0.06
    assert corpus.path.name.startswith("one-char-")


def test_bpe_is_trained_on_the_training_split_only(tmp_path):
    (tmp_path / "one.txt").write_text(book(1, 4000) + "zyzzogeton " * 60)
    data = DataConfig(files=str(tmp_path / "one.txt"), cache=str(tmp_path / "c"))
    corpus = ready(data, vocab_size=400)
    assert "zyzzogeton" in corpus.tokenizer.decode(corpus.val.tokens)
    assert not any(b"zyz" in piece for piece in corpus.tokenizer.pieces)
    assert corpus.tokenizer.n_vocab <= 400


def test_second_time_is_opened_and_not_built(data, monkeypatch):
    first = ready(data)
    monkeypatch.setattr(store, "build", lambda *_: pytest.fail("built again"))
    again = ready(data)
    assert (again.path, again.sha256) == (first.path, first.sha256)
    assert left_in(data) == [first.path.name]
    assert isinstance(again.train.tokens, np.memmap)
    assert open_corpus(first.path).meta == first.meta


def test_key_follows_content_and_settings_only(data, shelf, tmp_path):
    def name(**changes) -> str:
        vocab_size = changes.pop("vocab_size", 512)
        return ready(data.model_copy(update=changes), vocab_size).path.name

    first = name()
    for path in shelf.rglob("*.txt"):
        os.utime(path, (1, 1))
    assert name() == first
    assert name(vocab_size=300) == first  # bytes do not depend on it
    assert name(cache=str(tmp_path / "other")) == first
    assert name(bytes_per_domain=5) == first
    assert name(val_fraction=0.3) != first
    assert name(tokenizer="char") != first
    bpe = [name(tokenizer="bpe", vocab_size=n) for n in (300, 310)]
    assert len({*bpe, first}) == 3
    path = shelf / "tales" / "1.txt"
    path.write_text(path.read_text().replace("renard", "Renard", 1))
    assert name() != first


def test_sha256_follows_tokens_alone(data, tmp_path):
    first = ready(data)
    elsewhere = data.model_copy(update={"cache": str(tmp_path / "other")})
    assert ready(elsewhere).sha256 == first.sha256
    assert ready(data.model_copy(update={"val_fraction": 0.5})).sha256 != first.sha256


@pytest.mark.parametrize("damage", ["truncate", "lengthen", "remove", "meta", "empty meta"])
def test_damaged_folder_is_refused_and_rebuilt(data, damage, caplog):
    corpus = ready(data)
    named = {"truncate": "train.npy", "lengthen": "val.npy", "remove": "val_documents.npy"}
    name = named.get(damage, "meta.json")
    path = corpus.path / name
    if damage == "remove":
        path.unlink()
    elif damage == "lengthen":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.write_bytes(b"{}" if damage == "empty meta" else path.read_bytes()[:-10])
    with pytest.raises(UserError, match="delete that folder"):
        open_corpus(corpus.path)
    assert ready(data).sha256 == corpus.sha256
    assert "damaged or incomplete" in caplog.text
    assert left_in(data) == [corpus.path.name]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no prepared tokens there"):
        open_corpus(tmp_path / "nowhere")


def test_tokenizer_must_fit_the_model_even_when_cached(data):
    assert "byte tokenizer needs 257 ids, model.vocab_size=200" in fault(data, vocab_size=200)
    assert left_in(data) == []
    ready(data)
    assert "set model.vocab_size=264" in fault(data, vocab_size=200)


def test_short_splits_are_named_with_their_numbers(tmp_path, data):
    (tmp_path / "tiny.txt").write_text("0123456789" * 10)
    tiny = data.model_copy(update={"files": (str(tmp_path / "tiny.txt"),)})
    message = fault(tiny, context=32)
    assert "validation split holds 21 tokens, model.context=32 needs at least 33" in message
    assert "training split holds 81 tokens" in fault(tiny, context=100)
    assert left_in(data) == []
    n_val = len(ready(data).val)
    assert len(ready(data, context=n_val - 1).val) == n_val
    assert f"holds {n_val:,} tokens" in fault(data, context=n_val)


def test_full_disk_leaves_nothing_behind(data, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Growing, "append", full)
    message = fault(data)
    assert "No space left on device" in message and data.cache in message
    assert "data.cache=PATH" in message
    assert left_in(data) == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in fault(data)
    assert left_in(data) == []
    monkeypatch.undo()
    ready(data)


def test_interruption_leaves_nothing_behind(data, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Growing, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(data)
    assert left_in(data) == []


def test_cache_that_is_a_file(data, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert f"{tmp_path / 'cache'}" in fault(data)


def test_only_old_leftovers_of_the_same_corpus_are_removed(data):
    name = ready(data).path.name
    for path in (data.cache + "/" + name, data.cache + f"/.{name}.old", data.cache + "/.else.old"):
        os.makedirs(path, exist_ok=True)
    os.makedirs(data.cache + f"/.{name}.new")
    long_ago = time.time() - 200_000
    os.utime(data.cache + f"/.{name}.old", (long_ago, long_ago))
    (open_corpus(data.cache + "/" + name).path / "val.npy").unlink()
    ready(data)
    assert left_in(data) == sorted([name, f".{name}.new", ".else.old"])


def test_loser_of_a_race_uses_the_winners_folder(data, monkeypatch):
    """On a disk that knows no locks."""
    monkeypatch.setattr(store, "locked", lambda path, wait: contextlib.nullcontext())
    real = building._write_meta

    def late(folder, *rest):
        """Another process finishes the same corpus just before this one does."""
        monkeypatch.setattr(building, "_write_meta", real)
        winners.append(ready(data).path.stat().st_ino)
        real(folder, *rest)

    winners: list[int] = []
    monkeypatch.setattr(building, "_write_meta", late)
    corpus = ready(data)
    assert [corpus.path.stat().st_ino] == winners
    assert left_in(data) == [corpus.path.name]


def test_two_processes_at_once(data, tmp_path):
    code = (
        "import sys; from nano_moe.config import DataConfig\n"
        "from nano_moe.text.store import prepare\n"
        "data = DataConfig.model_validate_json(sys.argv[1])\n"
        "sys.stdin.readline()\n"
        "print(prepare(data, 300, 32).sha256)"
    )
    shared = data.model_copy(update={"tokenizer": "bpe"})
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, shared.model_dump_json()],
            stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    time.sleep(0.5)
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    apart = shared.model_copy(update={"cache": str(tmp_path / "apart")})
    assert ready(apart, 300).sha256 == outputs[0][0].strip()
    assert len(left_in(shared)) == 1
    assert any("tokenizing" in err for _, err in outputs)


def test_table_to_look_at(data, capsys):
    corpus = ready(data)
    rows = [r.split("\t") for r in (corpus.path / "documents.tsv").read_text().splitlines()]
    assert rows[0] == ["split", "domain", "first_token", "bytes", "tokens", "name"]
    assert len(rows) == 13
    assert {json.loads(row[-1]).split("/")[0] for row in rows[1:]} == {"shelf"}
    assert sum(int(row[3]) for row in rows[1:] if row[0] == "val") == corpus.val.n_bytes.sum()
    assert capsys.readouterr().err == ""


def test_importing_the_room_is_light():
    code = (
        "import sys, nano_moe.text.store, nano_moe.text.windows;"
        "print([m for m in ('torch', 'lightning', 'datasets', 'rustbpe') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
