"""The shelf and the writer: the same order, split and files as with everything in memory."""

import json

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


@pytest.mark.parametrize("first", [0, 1], ids=["its first flush", "a later one"])
@pytest.mark.parametrize("writes", [1, 5, 20])
def test_a_flush_that_came_to_no_end_leaves_nothing(tmp_path, monkeypatch, first, writes):
    """Stopped between two files: what they hold was noted nowhere, and is put again."""
    shelf = Shelf(tmp_path / "texts")
    books = [book(i) for i in range(90)]
    for one in books[: 30 * first]:
        shelf.put(one)
    shelf.flush()
    noted = json.loads(json.dumps(shelf.kept())) if first else None
    for one in books[30 * first : 60]:
        shelf.put(one)
    real, left = Shelf._file, [writes]

    def full(self, number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(self, number)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Shelf, "_file", full)
        shelf.flush()
    assert len(list((tmp_path / "texts").iterdir())) >= writes
    again = Shelf(tmp_path / "texts", noted)
    for one in books[30 * first :]:
        again.put(one)
    again.flush()
    assert [list(part) for part in again.split(0.3)] == list(split_by_name(books, 0.3))


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
