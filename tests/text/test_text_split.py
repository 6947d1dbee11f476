"""Cutting and splitting: nothing is lost, names decide, and a lone file is split from its end."""

import random

from hypothesis import given
from hypothesis import strategies as st

from nano_moe.text.split import (
    Document,
    cut_long,
    head,
    kindred,
    split_by_name,
    split_from_end,
)

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=3000)
LINED_TEXT = st.text(st.sampled_from("aé漢🙂 \n"), max_size=5000)
UNLINED_TEXT = st.text(st.sampled_from("aé漢🙂"), min_size=100, max_size=3000)


def documents(n: int, size: int = 100) -> list[Document]:
    return [Document(f"folder/{i}.txt", "d", "x" * size) for i in range(n)]


@given(ANY_TEXT | LINED_TEXT | UNLINED_TEXT, st.integers(64, 1024))
def test_pieces_add_up_and_are_short(text, longest):
    pieces = cut_long(Document("long", "d", text), longest)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.n_bytes <= longest for piece in pieces)
    assert len({piece.name for piece in pieces}) == len(pieces)


def test_pieces_end_at_paragraphs():
    text = "a line\nand another\n\n" * 400
    pieces = cut_long(Document("long", "d", text), 1000)
    assert len(pieces) > 10
    assert all(piece.text.endswith("\n\n") for piece in pieces)


@given(ANY_TEXT | LINED_TEXT | UNLINED_TEXT, st.integers(0, 5000))
def test_head_starts_the_text_within_its_bytes(text, n_bytes):
    start = head(text, n_bytes)
    assert text.startswith(start)
    assert len(start.encode()) <= n_bytes
    assert start == text or len(start.encode()) >= n_bytes // 2 - 3


@given(st.integers(2, 200), st.floats(0.01, 0.9), st.randoms(use_true_random=False))
def test_names_decide_and_not_the_order(n, fraction, shuffle: random.Random):
    given_order = documents(n)
    train, val = split_by_name(given_order, fraction)
    assert not {d.name for d in train} & {d.name for d in val}
    assert len(train) + len(val) == n and train and val
    assert len(val) * 100 >= fraction * n * 100 or len(train) == 1
    other_order = given_order[:]
    shuffle.shuffle(other_order)
    assert split_by_name(other_order, fraction) == (train, val)


def test_names_decide_and_not_the_text():
    _, val = split_by_name(documents(50), 0.2)
    other = [d._replace(text="y" * 100) for d in documents(50)]
    assert {d.name for d in split_by_name(other, 0.2)[1]} == {d.name for d in val}


def test_of_few_documents_the_smallest_hash_is_held_out():
    train, val = split_by_name(documents(2), 0.05)
    assert len(train) == len(val) == 1
    assert val == split_by_name(documents(2), 0.0001)[1]


@given(st.text(st.sampled_from("ab\n é"), min_size=40, max_size=4000), st.floats(0.05, 0.5))
def test_lone_document_is_split_from_its_end(text, fraction):
    (train,), (val,) = split_from_end(Document("one", "d", text), fraction)
    assert train.text + val.text == text
    exact = round(fraction * len(text))
    assert abs(len(val.text) - exact) <= min(200, exact // 4 + 1)


def test_lone_document_is_cut_at_a_line_end_if_one_is_near():
    (train,), (val,) = split_by_name([Document("one", "d", "nine chars\n" * 900)], 0.1)
    assert train.text.endswith("\n") and val.text.startswith("nine")
    unlined = "x" * 1000
    (train,), (val,) = split_by_name([Document("one", "d", unlined)], 0.1)
    assert len(val.text) == 100


def test_near_copies_are_never_parted():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    originals = [rng.choices(words, k=200) for _ in range(20)]
    copies = [
        Document(f"{i}-{version}", "d", " ".join([*original, f"version {version}"]))
        for i, original in enumerate(originals)
        for version in range(4)
    ]
    train, val = split_by_name(kindred(copies), 0.2)
    assert {d.name.split("-")[0] for d in train}.isdisjoint(d.name.split("-")[0] for d in val)
    assert len(val) == 16
    plain = split_by_name(copies, 0.2)[1]
    assert len({d.name.split("-")[0] for d in plain}) > 4


def test_kin_alone_are_still_split():
    kin = [d._replace(kin="all") for d in documents(10)]
    train, val = split_by_name(kin, 0.2)
    assert (len(train), len(val)) == (8, 2)


def test_kin_at_the_front_wait_where_they_are_over_twice_the_share():
    alone = documents(20)
    (first,) = split_by_name(alone, 0.01)[1]  # stands at the front of the line
    kin = [d._replace(name=f"copy {i}", kin=first.name) for i, d in enumerate(documents(8))]
    line = [*kin, *(d for d in alone if d != first)]
    train, val = split_by_name(line, 0.1)
    assert set(kin) <= set(train)
    assert len(val) == 3  # of 27 alike
    train, val = split_by_name(line, 0.2)
    assert set(kin) == set(val)
