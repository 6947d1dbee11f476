"""A checkpoint that is not what was written: its checksum tells, and the one before is taken."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import SAVE_EVERY, STEPS, copy_of, state_of, times, verb

from nano_moe import checkpoints
from nano_moe.checkpoints import DamagedCheckpoint
from nano_moe.errors import UserError
from nano_moe.explorer.opened import find
from nano_moe.files import SEAL, SEAL_BYTES, is_damaged, replacing


def tear(path: Path, draw: random.Random) -> str:
    """Damage a file at random, as disks, cables and copies cut short do; the way it was done."""
    raw = bytearray(path.read_bytes())
    at, length = draw.randrange(len(raw)), draw.randrange(1, 5000)
    way = draw.choice(["a bit", "cut", "zeros", "other bytes", "shifted", "empty"])
    if way == "a bit":
        raw[at] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del raw[at:]
    elif way == "zeros":
        raw[at : at + length] = bytes(len(raw[at : at + length]))
    elif way == "other bytes":
        raw[at : at + length] = draw.randbytes(len(raw[at : at + length]))
    elif way == "shifted":
        raw[at:at] = draw.randbytes(length)
    else:
        raw.clear()
    path.write_bytes(raw)
    return f"{way} at {at}"


def test_no_damage_is_ever_read_as_a_checkpoint(course, ledger):
    """Found damaged, or harmless: what is read is what was written."""
    draw, whole = random.Random(3), course.whole.last.read_bytes()
    right, path, refused = state_of(course.whole.last), Path("torn.ckpt"), 0
    tries = times(60, 500)
    for _ in range(tries):
        path.write_bytes(whole)
        way = tear(path, draw)
        with ledger.attempt("a torn checkpoint is told apart"):
            try:
                checkpoints.read_checkpoint(path)
            except DamagedCheckpoint:
                refused += 1
            else:
                assert state_of(path) == right, way
    assert refused > 0.8 * tries


@settings(max_examples=100)
@given(content=st.binary(max_size=400), at=st.integers(0, 600), bit=st.integers(0, 7))
def test_a_seal_shows_every_changed_bit(tmp_path_factory, content, at, bit):
    path = tmp_path_factory.mktemp("sealed") / "x"
    with replacing(path, sealed=True) as file:
        file.write(content)
    raw = bytearray(path.read_bytes())
    assert raw[:-SEAL_BYTES] == content and not is_damaged(path)
    at %= len(raw)
    raw[at] ^= 1 << bit
    path.write_bytes(raw)
    in_mark = len(content) <= at < len(content) + len(SEAL)  # then it is no seal any more
    assert is_damaged(path) or in_mark


def test_a_checkpoint_of_an_older_version_has_no_checksum_and_is_read(course):
    raw = course.whole.last.read_bytes()
    assert raw[-SEAL_BYTES:].startswith(SEAL)
    Path("older.ckpt").write_bytes(raw[:-SEAL_BYTES])
    assert checkpoints.read_checkpoint(Path("older.ckpt"))["global_step"] == STEPS


def test_resume_goes_on_from_the_one_before(course, ledger):
    """One line says so, the end is on course, and the damaged file never takes its place."""
    run = copy_of(course.whole, "broken")
    tear(run.last, random.Random(1))
    raw = run.previous.read_bytes()
    with ledger.attempt("a torn last.ckpt: resume takes previous.ckpt"):
        status, _, lines = verb("resume", "broken")
        told = [line for line in lines if line.startswith("WARNING") and "ckpt" in line]
        assert status == 0 and len(told) == 1
        assert str(run.last) in told[0]
        assert told[0].endswith(f"taking previous.ckpt of step {STEPS - SAVE_EVERY}")
        assert run.previous.read_bytes() == raw
        assert course.check(run) == STEPS


def test_two_damaged_ones_are_refused_in_one_line(course):
    run = copy_of(course.whole, "broken")
    for path in (run.last, run.previous):
        path.write_bytes(b"cut")
    status, _, lines = verb("resume", "broken")
    assert status == 2 and lines[-1].startswith(f"error: {run.last}: not a readable checkpoint")
    assert "previous.ckpt cannot be read either" in lines[-1]
    assert lines[-1].endswith(f"make train RECIPE={run.recipe_file}")


@pytest.mark.parametrize(
    "reader", ["eval", "sample", "sample from disk", "export", "explore", "report-html"]
)
def test_readers_fall_back_with_one_line(course, ledger, reader):
    run = copy_of(course.whole, "broken")
    raw = bytearray(run.best.read_bytes())
    raw[len(raw) // 2] ^= 1
    run.best.write_bytes(raw)
    arguments = {
        "eval": ["eval", "broken", "--json"],
        "sample": ["sample", "broken", "--tokens", "3"],
        "sample from disk": ["sample", "broken", "--tokens", "3", "--expert-budget", "50%"],
        "export": ["export", "broken", "--to", "gguf", "out.gguf"],
        "report-html": ["report-html", "broken", "--out", "out.html", "--passages", "1"],
    }
    if reader == "export":
        pytest.importorskip("gguf")
    with ledger.attempt("a torn best.ckpt: eval, sample, export and explore take last.ckpt"):
        if reader == "explore":
            last = torch.load(run.last, weights_only=True)["state_dict"]
            held = find("broken").model.state_dict()
            assert all(torch.equal(held[k.removeprefix("model.")], last[k]) for k in last)
            return
        status, _, lines = verb(*arguments[reader])
        told = [line for line in lines if line.startswith("WARNING")]
        assert status == 0 and len(told) == 1, lines
        assert "best.ckpt: damaged" in told[0] and told[0].endswith(f"last.ckpt of step {STEPS}")


def test_a_foreign_checkpoint_is_not_passed_over(course):
    """Only damage is: another kit's file in that place is the user's to explain."""
    run = copy_of(course.whole, "broken")
    torch.save({"weight": torch.ones(2)}, run.last)
    with pytest.raises(UserError, match="not one of nano_moe"):
        checkpoints.newest(run)
