"""Kinds of tokens, and what experts tell about them beside the control."""

import math

import pytest
import torch

from nano_moe.specialization import KINDS, affinity, joint, kind_of, shuffled, told


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" fox", "word start"), ("\n\nfox", "word start"), ("ing", "word part"),
        ("été", "word part"), ("'s", "word part"), (" 42", "number"), ("½", "number"),
        ("1,", "number"), ("\n\n  ", "white space"), (" (", "punctuation"), ("!?", "punctuation"),
        ("x1", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(piece, kind):
    assert KINDS[kind_of(piece.encode())] == kind


def test_bytes_that_form_no_character_are_of_no_kind():
    assert KINDS[kind_of(b"\xc3")] == KINDS[kind_of(b" \x9f")] == "other"


def test_domains_are_shuffled_by_whole_windows_and_the_rest_token_by_token():
    values = torch.arange(6).unsqueeze(1).expand(6, 5)
    whole = shuffled(values, 0, whole_windows=True).view(6, 5)
    assert (whole == whole[:, :1]).all() and sorted(whole[:, 0].tolist()) == list(range(6))
    single = shuffled(values, 0, whole_windows=False)
    assert sorted(single.tolist()) == sorted(values.flatten().tolist())
    assert not (single.view(6, 5) == single.view(6, 5)[:, :1]).all()


def test_information_and_its_control_are_those_of_the_labels():
    """Where whole windows share a label, only shuffling windows gives the larger floor."""
    values = (torch.arange(64) % 2).unsqueeze(1).expand(64, 10)  # (W, T)
    ids = values.reshape(-1, 1)
    table = joint(values.flatten(), ids, (2, 2))
    found = told(values, ids, table, whole_windows=True, shuffles=8)
    assert found.bits == 1
    assert found.control == pytest.approx(1 / (2 * math.log(2) * 64), rel=0.8)
    single = told(values, ids, table, whole_windows=False, shuffles=8)
    assert single.control < found.control / 3


def test_affinity_is_a_share_of_what_is_frequent():
    table = torch.tensor([[3, 1], [1, 0], [0, 0]])
    assert affinity(table, 2).tolist() == [[0.75, 0.25], [0, 0], [0, 0]]
