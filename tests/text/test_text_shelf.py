"""The shelf and the writer: the same order, split and files as with everything in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_moe.text import shelf as shelves
from nano_moe.text.shelf import Shelf
from nano_moe.text.split import Document, in_hash_order, split_by_name
from nano_moe.text.writer import Growing


def book(i: int) -> Document:
    return Document(f"book {i}", "ab"[i % 2], f"text {i} 漢字\n" * (1 + i * 7 % 13))


@pytest.mark.parametrize("waiting", [1, 500, 10**9])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_the_split_is_that_of_documents_in_memory(tmp_path, monkeypatch, waiting, fraction, n):
    monkeypatch.setattr(shelves, "WAITING", waiting)
    documents, shelf = [book(i) for i in range(n)], Shelf(tmp_path / "texts")
    for document in documents:
        shelf.put(document)
    expected = split_by_name(documents, fraction)
    for _ in range(2):  # each can be walked again
        assert [list(part) for part in shelf.split(fraction)] == list(expected)
    if n > 1:
        train, val = shelf.split(fraction)
        assert list(train.after(2)) == expected[0][2:]
        assert list(val.after(len(expected[1]))) == []
    assert list(shelf.domains) == list("ab")[: min(n, 2)]
    assert (tmp_path / "texts").exists() == (waiting < 10**9 and shelf.n_bytes >= waiting)


def test_what_was_noted_is_found_again_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(shelves, "WAITING", 100)
    shelf = Shelf(tmp_path / "texts")
    noted = shelf.kept()
    for i in range(30):
        if shelf.put(book(i)):
            noted, n = shelf.kept(), i + 1
    again = Shelf(tmp_path / "texts", noted)  # after a kill: the rest was written in vain
    for i in range(n, 40):
        again.put(book(i))
    parts = again.split(0.3)
    assert [list(part) for part in parts] == list(split_by_name([book(i) for i in range(40)], 0.3))
    next((tmp_path / "texts").iterdir()).write_bytes(b"")
    with pytest.raises(ValueError, match="shorter"):
        Shelf(tmp_path / "texts", noted)


def test_names_that_no_file_could_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(shelves, "WAITING", 1)
    odd = Document("a\udcff\n\"b'", "d\udc80", "line\u2028\r\n\x85text\x1e")
    shelf = Shelf(tmp_path / "texts")
    shelf.put(odd)
    shelf.put(book(1))
    assert list(shelf._after(0)) == in_hash_order([odd, book(1)])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.sampled_from([(), (3,)]), st.data())
def test_a_file_that_grew_is_what_numpy_writes(tmp_path_factory, lengths, row, data):
    folder = tmp_path_factory.mktemp("grown")
    parts = [np.arange(n * int(np.prod(row))).reshape(n, *row).astype("u2") for n in lengths]
    whole = np.concatenate([np.empty((0, *row), "u2"), *parts])
    np.save(folder / "whole.npy", whole)
    cut = data.draw(st.integers(0, len(parts)))
    grown = Growing(folder / "grown.npy", np.dtype("u2"), row)
    for part in parts[:cut]:
        grown.append(part)
    kept = grown.length
    grown.append(np.ones((4, *row)))  # lost
    grown.file.flush()
    again = Growing(folder / "grown.npy", np.dtype("u2"), row, kept)
    for part in parts[cut:]:
        again.append(part)
    again.close()
    assert (folder / "grown.npy").read_bytes() == (folder / "whole.npy").read_bytes()


def test_a_file_that_lost_rows_is_refused(tmp_path):
    grown = Growing(tmp_path / "grown.npy", np.dtype("u2"))
    grown.append(np.ones(3))
    grown.close()
    with pytest.raises(ValueError, match="shorter"):
        Growing(tmp_path / "grown.npy", np.dtype("u2"), (), 4)
