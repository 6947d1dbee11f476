"""Datasets of the hub, from folders laid out like one: documents, resuming, faults, memory."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nano_moe import recipe_file
from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text import building, hub, place, shelf, store
from nano_moe.text.split import Document
from nano_moe.text.store import prepare
from nano_moe.text.writer import SplitWriter

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = "the old fox 漢字 saw a hen — and voyait une poule 🦊".split()


def story(i: int) -> str:
    return " ".join(np.random.default_rng(i).choice(WORDS, 20 + i % 50)) + f"\nend of story {i}"


def write_rows(path, texts, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts, **columns})
    parquet.write_table(table, path, row_group_size=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The layout of TinyStories and FineWeb-Edu: parquet shards by split under data/."""
    root = tmp_path_factory.mktemp("hub") / "TinyTales"
    for part in range(3):
        texts = [story(i) for i in range(part * 200, part * 200 + 200)]
        texts[7] = ""
        write_rows(root / "data" / f"train-{part:05d}-of-00003.parquet", texts)
    write_rows(root / "data" / "validation-00000-of-00001.parquet", ["of another split"] * 9)
    return root


@pytest.fixture
def data(folder, tmp_path):
    return DataConfig(
        hub={"dataset": str(folder)}, tokenizer="bpe", val_fraction=0.1, cache=str(tmp_path / "c")
    )


def of_hub(data: DataConfig, **fields) -> DataConfig:
    return data.model_copy(update={"hub": data.hub.model_copy(update=fields)})


def ready(data: DataConfig) -> store.Corpus:
    return prepare(data, 300, 32, progress=False)


def fault(data: DataConfig) -> str:
    with pytest.raises(UserError) as error:
        ready(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def texts_of(corpus: store.Corpus) -> list[str]:
    found = []
    for split in (corpus.train, corpus.val):
        for start, end in zip(split.starts, [*split.starts[1:], len(split)], strict=True):
            assert split.tokens[end - 1] == corpus.tokenizer.end_id
            found.append(corpus.tokenizer.decode(split.tokens[start : end - 1]))
    return found


def contents(corpus: store.Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.path.iterdir()}


def test_every_row_of_the_split_is_a_document_once(data):
    corpus = ready(data)
    expected = [story(i) for i in range(600) if i % 200 != 7]
    assert sorted(texts_of(corpus)) == sorted(expected)
    assert corpus.domains == ("TinyTales",)
    assert corpus.path.name.startswith("TinyTales-bpe300-")
    total = corpus.meta["domains"]["TinyTales"]
    assert 0.1 <= total["val"]["bytes"] / sum(total[s]["bytes"] for s in total) < 0.15
    assert os.listdir(data.cache) == [corpus.path.name]


def test_rows_are_joined_to_documents_where_one_begins(tmp_path):
    """The layout of WikiText: a row is a line, and a title of the first level begins an article."""
    lines = ["", " = Fox = \n", "", " The fox runs . \n", " = = Food = = \n", " Hens . \n", ""]
    lines += [" = Hen = \n", " = = = Eggs = = = \n", " Many . \n"]
    lines += [line.replace("Hen", "Cock") for line in lines[7:]]
    root = tmp_path / "wiki"
    write_rows(root / "wikitext-raw" / "train-00000-of-00001.parquet", lines)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-raw\n  data_files:\n"
        "  - split: train\n    path: wikitext-raw/train-*\n---\n"
    )
    data = DataConfig(
        hub={
            "dataset": str(root), "config": "wikitext-raw", "document_start": "^ = [^=]+ = \n$",
        },
        tokenizer="byte", val_fraction=0.3, cache=str(tmp_path / "c"),
    )  # fmt: skip
    corpus = prepare(data, 300, 16, progress=False)
    expected = ["".join(lines[1:7]), "".join(lines[7:10]), "".join(lines[10:])]
    assert sorted(texts_of(corpus)) == sorted(expected)
    found = hub.found(data.hub)
    for cut in range(1, 3):  # left after any document and gone on with
        stream = hub.Stream(found)
        given = iter(stream)
        first = [next(given).text for _ in range(cut)]
        state = json.loads(json.dumps(stream.state))
        assert first + [one.text for one in hub.Stream(found, state)] == expected


RECIPES = Path(__file__).parents[2] / "recipes" / "hub"
LINES = [" = {} = \n", " It is written . \n", " = = {} = = \n", ""]


def card(*configs: tuple[str, str]) -> str:
    entries = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
        for name, path in configs
    ]
    return "---\nconfigs:\n" + "".join(entries) + "---\nA dataset.\n"


CARDS = {
    "tinystories": card(("default", "data/train-*")),
    "wikitext-103": card(
        ("wikitext-2-v1", "wikitext-2-v1/train-*"),
        ("wikitext-103-raw-v1", "wikitext-103-raw-v1/train-*"),
    ),
    "fineweb-edu": card(("default", "data/*/*"), ("sample-10BT", "sample/10BT/*")),
}
SHARDS = {
    "tinystories": ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    "wikitext-103": (
        "wikitext-103-raw-v1/train-00000-of-00001.parquet", "wikitext-2-v1/train-00000.parquet",
    ),
    "fineweb-edu": ("sample/10BT/000_00000.parquet", "data/CC-MAIN-2013-20/train-00000.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("carded", [True, False], ids=["card", "no card"])
@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "what is read alone"])
@pytest.mark.parametrize("name", SHARDS)
def test_each_recipe_reads_a_copy_of_its_dataset(tmp_path, name, whole, carded):
    """Laid out as the hub has it: all of it or the recipe's part, with the card or without."""
    ours, other = SHARDS[name]
    lines = [line.format(title) for title in ("Fox", "M", "=", "C++") for line in LINES]
    texts = lines if name == "wikitext-103" else [story(i) for i in range(9)]
    write_rows(tmp_path / "copy" / ours, texts)
    if whole:
        write_rows(tmp_path / "copy" / other, ["not of this part"])
    if carded:
        (tmp_path / "copy" / "README.md").write_text(CARDS[name])
    place = f"data.hub.dataset={tmp_path / 'copy'}"
    recipe = recipe_file.load(RECIPES / f"{name}.yaml", [place])
    rows = [document.text for document in hub.Stream(hub.found(recipe.data.hub))]
    if name == "wikitext-103":
        articles = ["Fox", "M", "C++"]
        assert [text.split("\n")[0] for text in rows] == [f" = {title} = " for title in articles]
        assert "".join(rows) == "".join(lines)
    else:
        assert rows == texts


def test_a_folder_that_holds_one_configuration_alone_is_read_without_its_name(tmp_path):
    write_rows(tmp_path / "10BT" / "000_00000.parquet", [story(i) for i in range(40)])
    data = DataConfig(
        hub={"dataset": str(tmp_path / "10BT"), "config": "sample-10BT"},
        tokenizer="byte", val_fraction=0.3, cache=str(tmp_path / "c"),
    )  # fmt: skip
    assert "'sample-10BT' not found" in fault(data) and "data.hub.config=null" in fault(data)
    assert len(texts_of(ready(of_hub(data, config=None)))) == 40


def test_a_part_is_taken_in_whole_documents(data):
    corpus = ready(of_hub(data, take_bytes=5000))
    whole = [story(i) for i in range(600) if i != 7]
    lengths = np.cumsum([len(text.encode()) for text in whole])
    taken = whole[: int(np.searchsorted(lengths, 5000, side="right"))]
    assert sorted(texts_of(corpus)) == sorted(taken)
    names = {json.loads(row.split("\t")[-1]): row.split("\t")[0] for row in _names(corpus)}
    more = {json.loads(r.split("\t")[-1]): r.split("\t")[0] for r in _names(ready(data))}
    assert names.keys() < more.keys()


def _names(corpus):
    return (corpus.path / "documents.tsv").read_text().splitlines()[1:]


def killed_after(monkeypatch, n: int) -> None:
    """The n-th note from now on is the last thing that happens."""
    real, left = place.Place.note, [n]

    def note(self, what, found):
        real(self, what, found)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(place.Place, "note", note)


@pytest.mark.parametrize("step", [1, 3])
def test_killed_at_every_note_it_ends_with_the_same_bytes(data, tmp_path, monkeypatch, step):
    expected = contents(ready(data.model_copy(update={"cache": str(tmp_path / "whole")})))
    monkeypatch.setattr(shelf, "WAITING", 30_000)
    monkeypatch.setattr(building, "BATCH", 10_000)
    monkeypatch.setattr(building, "NOTE_EVERY", 30_000)
    kills, corpus = 0, None
    while corpus is None:
        with monkeypatch.context() as patch:
            killed_after(patch, step)
            try:
                corpus = ready(data)
            except KeyboardInterrupt:
                kills += 1
        for notes in (tmp_path / "c").glob(".*.begun/train.json"):
            if "closed" not in notes.read_text():
                torn = notes.parent / "tokens" / "train.npy"
                torn.write_bytes(torn.read_bytes() + b"torn")
            for folder in (notes.parent, notes.parent / "tokens"):
                (folder / ".tokenizer.json.1.tmp").write_text("torn")
    assert kills >= 3
    assert contents(corpus) == expected
    assert os.listdir(data.cache) == [corpus.path.name]


def read_from_now_on(monkeypatch) -> list[Document]:
    """Will hold every document that a stream gives."""
    rows = []
    real = hub.Stream.__iter__

    def counted(self):
        for document in real(self):
            rows.append(document)
            yield document

    monkeypatch.setattr(hub.Stream, "__iter__", counted)
    return rows


def test_what_was_read_is_not_read_again(data, monkeypatch):
    monkeypatch.setattr(shelf, "WAITING", 9000)
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            ready(data)
    rows = read_from_now_on(monkeypatch)
    ready(data)
    assert 0 < len(rows) < 500


def test_what_a_fault_left_unwritten_is_not_written_later(data, monkeypatch, tmp_path):
    """Its buffers live on with the error that a caller keeps, and the folder by then is whole."""
    data = data.model_copy(update={"tokenizer": "byte"})
    expected = contents(ready(data.model_copy(update={"cache": str(tmp_path / "whole")})))
    monkeypatch.setattr(building, "BATCH", 500)
    real, left = SplitWriter.append, [5]

    def full(self, documents):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(self, documents)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space") as kept:
        patch.setattr(SplitWriter, "append", full)
        ready(data)
    corpus = ready(data)
    del kept
    gc.collect()
    assert contents(store.open_corpus(corpus.path)) == expected


def test_damaged_notes_cost_the_notes_and_no_more(data, monkeypatch, tmp_path):
    monkeypatch.setattr(shelf, "WAITING", 9000)
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            ready(data)
    (begun,) = (tmp_path / "c").glob(".*.begun")
    (begun / "read.json").write_text('{"shelf": {}}')
    assert "damaged" in fault(data) and not begun.exists()
    assert len(texts_of(ready(data))) == 597


def test_a_process_waits_for_the_one_that_is_at_it(data, caplog):
    import threading

    folder = store.Path(data.cache) / "x"
    order = []

    def second():
        with store._alone(folder):
            order.append("second")

    with store._alone(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "second"]
    assert "another process is preparing it" in caplog.text


def test_a_hub_out_of_reach_is_one_line_soon(data, monkeypatch):
    """A name of the hub, and a host that no one answers at."""
    calls = []

    def offline(self, name, **options):
        calls.append(options)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    message = fault(of_hub(data, dataset="roneneldan/TinyStories"))
    assert "roneneldan/TinyStories: the Hugging Face hub cannot be reached" in message
    assert "Name or service not known" in message and "folder with a copy" in message
    assert len(calls) == 1 and calls[0]["timeout"] <= 10


def test_a_connection_lost_on_the_way_keeps_what_was_read(data, monkeypatch, tmp_path):
    data = data.model_copy(update={"tokenizer": "byte"})
    expected = contents(ready(data.model_copy(update={"cache": str(tmp_path / "whole")})))
    monkeypatch.setattr(shelf, "WAITING", 9000)
    real = hub.Stream._documents

    def lost(self):
        for number, one in enumerate(real(self)):
            if number == 300:
                raise ConnectionError("Server Disconnected")
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(hub.Stream, "_documents", lost)
        patch.setattr(hub.Found, "folder", None)
        patch.setattr(hub, "_commit", lambda found, revision: None)
        message = fault(data)
    assert "cannot be reached (Server Disconnected)" in message
    rows = read_from_now_on(monkeypatch)
    assert contents(ready(data)) == expected
    left = [story(i) for i in range(600) if i % 200 != 7][300:]
    assert [row.text for row in rows[-len(left) :]] == left
    again = rows[: -len(left)]
    assert sum(row.n_bytes for row in again) < 9000, "more than waited was read again"


def test_faults_are_one_line_each(data, tmp_path):
    def of(**fields):
        return fault(of_hub(data, **fields))

    assert "Bad split: nope" in of(split="nope")
    assert "no column 'body' among id, text" in of(column="body")
    assert "data.hub.column" in of(column="body")
    assert "not a string" in of(column="id")
    assert "neither a folder here nor a name" in of(dataset="a/b/c")
    assert "neither a folder here nor a name" in of(dataset="../nowhere at all")
    (tmp_path / "empty").mkdir()
    assert "holds no data" in of(dataset=str(tmp_path / "empty"))
    assert "no text in TinyTales" in of(take_bytes=1)
    (tmp_path / "bad").mkdir()
    file = tmp_path / "bad" / "train.parquet"
    file.write_bytes(b"no parquet")
    assert f"{file}: not a readable parquet file" in of(dataset=str(file.parent))
    write_rows(file, [])
    assert f"{file}: holds no rows" in of(dataset=str(file.parent))
    with pytest.raises(ValueError, match="named twice"):
        DataConfig(files=("a",), hub={"dataset": "a/b"})
    with pytest.raises(ValueError, match="no regular expression"):
        DataConfig(hub={"dataset": "a/b", "document_start": "("})


def test_a_damaged_file_among_whole_ones_is_named_once(folder, data, tmp_path, caplog, capfd):
    shutil.copytree(folder, tmp_path / "copy")
    file = sorted((tmp_path / "copy" / "data").glob("train*"))[1]
    content = bytearray(file.read_bytes())
    content[50:1500] = b"\xff" * 1450
    file.write_bytes(content)
    assert f"{file}: damaged (" in fault(of_hub(data, dataset=str(tmp_path / "copy")))
    assert not caplog.records and "ERROR" not in capfd.readouterr().err


def test_the_key_follows_what_is_taken(data, folder, tmp_path):
    def key(**fields):
        return store._folder_name(data, 300, store.corpus.sources(of_hub(data, **fields)))

    assert key() != key(take_bytes=10) != key(take_bytes=11)
    assert key(dataset="a/b") != key(dataset="a/b", revision="x")
    copy = tmp_path / "elsewhere" / folder.name
    copy.parent.mkdir()
    copy.symlink_to(folder)
    assert key(dataset=str(copy)) == key()


CHILD = """
import sys
from nano_moe.config import DataConfig
from nano_moe.text.store import prepare
from nano_moe.text.writer import SplitWriter
data = DataConfig.model_validate_json(sys.argv[1])
print(prepare(data, 1000, 64, progress=False).sha256)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_mb(data: DataConfig) -> float:
    command = [sys.executable, "-c", CHILD, data.model_dump_json()]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1]) / 1000


def write_megabytes(path, megabytes: int) -> None:
    """Different texts of about 2 KB, in row groups of a megabyte or so."""
    path.parent.mkdir(parents=True)
    schema = pyarrow.schema([("text", pyarrow.string())])
    base = [" ".join(np.random.default_rng(i).choice(WORDS, 300)) for i in range(200)]
    with parquet.ParquetWriter(path, schema) as writer:
        written = number = 0
        while written < megabytes * 1e6:
            texts = [f"{number + i} {base[i]}" for i in range(200)]
            writer.write_table(pyarrow.table({"text": texts}))
            number, written = number + 200, written + sum(len(text.encode()) for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hub", "files"])
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path, kind):
    peaks = {}
    for megabytes in (20, 200):
        path = tmp_path / str(megabytes) / "train.parquet"
        write_megabytes(path, megabytes)
        where = {"hub": {"dataset": str(path.parent)}} if kind == "hub" else {"files": (str(path),)}
        data = DataConfig(**where, tokenizer="bpe", cache=str(tmp_path / "c"))
        peaks[megabytes] = peak_mb(data)
        path.unlink()
    assert peaks[200] - peaks[20] < 20, peaks
    assert peaks[200] < 2000


@pytest.mark.slow
def test_killed_for_real_it_goes_on(tmp_path):
    write_megabytes(tmp_path / "set" / "train.parquet", 60)
    hub_data = {"dataset": str(tmp_path / "set")}
    data = DataConfig(hub=hub_data, tokenizer="byte", cache=str(tmp_path / "c"))
    command = [sys.executable, "-c", CHILD, data.model_dump_json()]
    for noted in ("read.json", "train.json"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not list((tmp_path / "c").glob(f".*.begun/{noted}")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    whole = data.model_copy(update={"cache": str(tmp_path / "whole")})
    assert again == prepare(whole, 1000, 64, progress=False).sha256
