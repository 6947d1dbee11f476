"""Disks that fill up and folders that cannot be written: one line, nothing lost, and it goes on.

On a small disk of its own, which only the child sees that mounted it.
"""

import json
import os
from pathlib import Path

import pytest
from forking import ended, fork
from kit import (
    STEPS,
    Course,
    copy_of,
    make_read_only,
    mount_small,
    own_mounts,
    refused,
    resize,
    state_of,
    times,
    verb,
)  # fmt: skip

from nano_moe.runs import Run
from nano_moe.text import building, hub, shelf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mounts")]


def on_own_mounts(work) -> None:
    """Do `work` in a child that may mount; its assertions are ours."""

    def begin() -> None:
        own_mounts()
        work()

    assert ended(fork(begin)) == 0


def files(folder: str) -> dict[str, bytes]:
    held = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in held}


def on_new_disk(course: Course, size: int) -> None:
    """`checkpoints` becomes a disk with room for `size` bytes and nothing on it."""
    Path("checkpoints").rename("before")
    Path("checkpoints").mkdir()
    mount_small(Path("checkpoints"), size)


@pytest.mark.parametrize("share", [0.3, 2.5, 1.5, 3.2][: times(2, 4)])
def test_a_disk_that_fills_up_in_training(course, ledger, share):
    """`share`: of checkpoints that fit on it. With more room, the same run goes on."""
    one = course.whole.last.stat().st_size

    def work() -> None:
        on_new_disk(course, int(share * one) + 40_000)
        line = refused("train", "tiny.yaml", "--name", "full")
        assert "No space left" in line or "the disk may be full" in line, line
        run = Run(Path("checkpoints/full"))
        if share < 1:
            assert not run.path.exists()
            return
        course.check(run)
        assert not list(run.path.glob(".*.tmp"))
        resize(Path("checkpoints"), 100 * one)
        status, _, _ = verb("resume", "full")
        assert status == 0 and course.check(run) == STEPS

    with ledger.attempt("disk full in training"):
        on_own_mounts(work)


@pytest.mark.parametrize("room", range(0, 60_000, 60_000 // times(3, 12)))
def test_a_disk_that_fills_up_in_preparing(course, ledger, room):
    Path("text.txt").write_text("the old fox\n" * 5000)  # 60,000 tokens of two bytes

    def work() -> None:
        Path("small").mkdir()
        mount_small(Path("small"), room + 4096)
        line = refused("prepare", "tiny.yaml", "data.cache=small")
        assert line.startswith("error: small/text-byte-"), line
        assert "No space left" in line or "the disk may be full" in line, line
        assert list(Path("small").iterdir()) == []
        resize(Path("small"), 10**7)
        assert verb("prepare", "tiny.yaml", "data.cache=small")[0] == 0

    with ledger.attempt("disk full in preparing"):
        on_own_mounts(work)


HUB = ["data.files=[]", "data.hub.dataset=tales"]


def write_tales(n: int) -> None:
    """A dataset as the hub has them: shards of parquet, a story a row."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Path("tales/data").mkdir(parents=True)
    for part in range(2):
        texts = [f"{i}: the old fox saw a hen and ran to the river " * 4 for i in range(part, n, 2)]
        path = f"tales/data/train-{part:05d}-of-00002.parquet"
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)


def read_from_now_on(monkeypatch) -> list[str]:
    """Will hold the name of every document that a dataset of the hub gives."""
    given, real = [], hub.Stream.__iter__

    def told(self):
        for document in real(self):
            given.append(document.name)
            yield document

    monkeypatch.setattr(hub.Stream, "__iter__", told)
    return given


ROOMS = (0, 1_050_000, 400_000, *range(50_000, 950_000, 100_000))  # bytes of such a disk


@pytest.mark.parametrize("room", ROOMS[: times(3, 12)])
def test_a_disk_that_fills_up_in_preparing_a_dataset(course, ledger, monkeypatch, room):
    """Text waits in some 230 files of a page each; in the last tenth, tokens are being written."""
    monkeypatch.setattr(shelf, "WAITING", 8_000)
    monkeypatch.setattr(building, "BATCH", 8_000)
    monkeypatch.setattr(building, "NOTE_EVERY", 16_000)

    def work() -> None:
        write_tales(600)
        assert verb("prepare", "tiny.yaml", *HUB, "data.cache=whole")[0] == 0
        whole = files("whole")
        Path("small").mkdir()
        mount_small(Path("small"), room + 4096)
        read = read_from_now_on(monkeypatch)
        line = refused("prepare", "tiny.yaml", *HUB, "data.cache=small")
        assert line.startswith("error: small/tales-byte-"), line
        assert "No space left" in line or "the disk may be full" in line, line
        noted = [json.loads(p.read_text()) for p in Path("small").glob(".*.begun/read.json")]
        all_read = bool(noted) and noted[0]["stream"] is None
        assert all_read == (room > 10**6)
        resize(Path("small"), 10**7)
        read.clear()
        assert verb("prepare", "tiny.yaml", *HUB, "data.cache=small")[0] == 0
        assert len(read) < 600 if noted else len(read) == 600
        assert not all_read or read == []
        assert files("small") == {f"small{name[5:]}": raw for name, raw in whole.items()}

    with ledger.attempt("disk full in preparing a dataset of the hub"):
        on_own_mounts(work)


@pytest.mark.parametrize("room", [0, 30_000])
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_disk_that_fills_up_in_exporting(course, ledger, kind, room):
    pytest.importorskip("gguf")

    def work() -> None:
        Path("small").mkdir()
        mount_small(Path("small"), room + 4096)
        line = refused("export", "whole", "--to", kind, "small/out")
        assert line.startswith("error: small/out: could not be written"), line
        assert list(Path("small").iterdir()) == []

    with ledger.attempt("disk full in exporting"):
        on_own_mounts(work)


def test_a_folder_of_runs_that_cannot_be_written(course, ledger):
    """Whatever writes refuses in one line; whatever reads works."""
    copy_of(course.whole, "stopped").last.unlink()
    before = files("checkpoints")

    def work() -> None:
        make_read_only(Path("checkpoints"))
        for arguments in (
            ["train", "tiny.yaml", "--name", "x"],
            ["train", "tiny.yaml"],
            ["resume", "stopped"],
            ["sample", "whole", "--tokens", "2", "--expert-budget", "50%"],
        ):
            line = refused(*arguments)
            assert "checkpoints" in line and "Read-only file system" in line, line
        assert verb("eval", "whole")[0] == 0
        assert verb("sample", "whole", "--tokens", "2")[0] == 0
        assert verb("compare", "whole", "stopped")[0] == 0

    with ledger.attempt("folder of runs is read-only"):
        on_own_mounts(work)
        assert files("checkpoints") == before


def test_a_cache_that_cannot_be_written(course, ledger):
    def work() -> None:
        make_read_only(Path("cache"))
        line = refused("prepare", "tiny.yaml", "data.val_fraction=0.3")
        assert "cache/text-byte-" in line and "Read-only file system" in line, line
        assert verb("prepare", "tiny.yaml")[0] == 0, "what is prepared needs no writing"
        assert verb("train", "tiny.yaml", "--name", "x", "trainer.steps=2")[0] == 0

    with ledger.attempt("cache of tokens is read-only"):
        on_own_mounts(work)


def test_an_export_into_a_folder_that_cannot_be_written(course, ledger):
    pytest.importorskip("gguf")

    def work() -> None:
        Path("fixed").mkdir()
        make_read_only(Path("fixed"))
        for kind in ("hf", "gguf"):
            line = refused("export", "whole", "--to", kind, "fixed/out")
            assert "fixed/out" in line and "Read-only file system" in line, line
        assert os.listdir("fixed") == []

    with ledger.attempt("target of an export is read-only"):
        on_own_mounts(work)


def test_a_disk_with_just_room_for_what_is_kept_is_never_full(course, ledger):
    """The rule: three checkpoints, and a fourth while it is being written."""
    one = course.whole.last.stat().st_size

    def work() -> None:
        on_new_disk(course, 4 * one + 300_000)
        assert verb("train", "tiny.yaml", "--name", "fits")[0] == 0
        assert state_of(Path("checkpoints/fits/last.ckpt")) == course.known[STEPS]

    with ledger.attempt("disk of the size that the retention rule needs"):
        on_own_mounts(work)
