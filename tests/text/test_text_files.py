"""The user's own files: what is read, under which names, and one line for each fault."""

import json
import os

import pytest

from nano_moe.config import DataConfig
from nano_moe.errors import UserError
from nano_moe.text.corpus import documents, sources, split


def read(*paths, **fields):
    return list(documents(DataConfig(files=tuple(map(str, paths)), **fields)))


def fault(*paths) -> str:
    with pytest.raises(UserError) as error:
        read(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_parquet(path, columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def library(tmp_path):
    """A folder with text in it and below it, and things that are not text."""
    root = tmp_path / "library"
    for name in ("b.txt", "a.md", "poems/one.txt", "poems/old/two.txt", "code/main.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n" * 3)
    (root / "photo.png").write_bytes(b"\x89PNG\xff")
    (root / ".git").mkdir()
    (root / ".git" / "HEAD.txt").write_text("not text of the user")
    return root


def test_folder_is_walked_in_order(library):
    found = read(library)
    assert [(d.name, d.domain) for d in found] == [
        ("library/a.md", "library"),
        ("library/b.txt", "library"),
        ("library/code/main.py", "code"),
        ("library/poems/old/two.txt", "poems"),
        ("library/poems/one.txt", "poems"),
    ]
    assert found[0].text == "text of a.md\n" * 3


def test_split_does_not_depend_on_where_the_folder_lies(library, tmp_path):
    data = DataConfig(files=(str(library),), val_fraction=0.3)
    names = [[d.name for d in part] for part in split(list(documents(data)), data)]
    moved = library.rename(tmp_path / "elsewhere")
    moved = moved.rename(tmp_path / "library2")
    data = DataConfig(files=(str(moved.rename(tmp_path / "library")),), val_fraction=0.3)
    assert [[d.name for d in part] for part in split(list(documents(data)), data)] == names
    assert all(names)


def test_lone_file_stays_whole_and_several_are_cut(tmp_path):
    long = "a line of a long file\n" * 10_000
    (tmp_path / "long.txt").write_text(long)
    (tmp_path / "short.txt").write_text("short")
    assert [d.text for d in read(tmp_path / "long.txt")] == [long]
    pieces = read(tmp_path / "long.txt", tmp_path / "short.txt")
    assert [d.name for d in pieces[:2]] == ["long.txt#0", "long.txt#1"]
    assert {d.domain for d in pieces} == {"long", "short"}
    assert "".join(d.text for d in pieces) == long + "short"


def test_equal_names_stay_apart_and_repeats_are_read_once(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(f"of {folder}")
    paths = [tmp_path / "x" / "same.txt", tmp_path / "y" / "same.txt", tmp_path / "x" / "same.txt"]
    assert [(d.name, d.text) for d in read(*paths)] == [
        ("same.txt", "of x"),
        ("same.txt~2", "of y"),
    ]


def test_any_ending_is_text_when_named_itself(tmp_path):
    path = tmp_path / "notes.weird"
    path.write_bytes("\ufeffcaf\u00e9\r\n".encode())
    assert read(path)[0].text == "caf\u00e9\r\n"


def test_jsonl_and_parquet_rows_are_documents(tmp_path):
    texts = ["first\nof two", "second \u2028 é", "third"]
    lines = [
        json.dumps({"text": text, "id": i}, ensure_ascii=False) for i, text in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:2], "", lines[2]]) + "\n")
    found = read(tmp_path / "rows.jsonl")
    assert [d.text for d in found] == texts
    assert [d.name for d in found] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    write_parquet(tmp_path / "rows.parquet", {"id": [1, 2, 3], "text": texts})
    assert [d.text for d in read(tmp_path / "rows.parquet")] == texts


def test_missing_and_textless_paths(tmp_path):
    assert "does not exist" in fault(tmp_path / "nowhere")
    (tmp_path / "photo.png").write_bytes(b"x")
    assert f"folder {tmp_path} holds no text" in fault(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    assert f"{tmp_path / 'empty.txt'}: no text" in fault(tmp_path / "empty.txt")
    (tmp_path / "void.jsonl").write_text('{"text": ""}\n')
    assert "the 2 files of data.files: no text" in fault(tmp_path)


def test_bytes_that_are_not_text(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("un caf\u00e9 noir".encode("latin-1"))
    assert f"{latin}: not UTF-8 at byte 6 (0xe9)" in fault(latin)
    binary = tmp_path / "weights.bin"
    binary.write_bytes(b"abc\0def")
    assert f"{binary}: binary, with a zero at byte 3" in fault(binary)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{text: 1}", "not JSON"),
        ('{"body": "x"}', 'no string under "text"'),
        ('{"text": 5}', 'no string under "text"'),
        ('["x"]', 'no string under "text"'),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert f"{path}:2: {message}" in fault(path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"body": ["x"], "id": [1]})
    assert f"{path}: no column 'text' among body, id" in fault(path)
    write_parquet(path, {"text": ["x", None]})
    assert f"{path}: row 2: 'text' is not a string" in fault(path)
    path.write_text("this is no parquet file")
    assert f"{path}: not a readable parquet file" in fault(path)


def test_identity_follows_content_and_not_time(library):
    data = DataConfig(files=(str(library),))
    before = sources(data).identity
    os.utime(library / "a.md", (1, 1))
    assert sources(data).identity == before
    (library / "a.md").write_text("changed")
    assert sources(data).identity != before
