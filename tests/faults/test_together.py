"""Two processes at one thing: one of them does it, the other waits or is told; nothing is torn."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from forking import ended, fork
from kit import copy_of, refused, times, verb, wait_for

from nano_moe import runs
from nano_moe.runs import Run
from nano_moe.text import building, place, store
from nano_moe.training.module import Decoder

pytestmark = pytest.mark.slow


def at_once(work, n: int) -> list[int]:
    """Exit statuses of `n` children that begin `work` at the same moment."""
    reader, writer = os.pipe()

    def begin() -> None:
        os.close(writer)
        os.read(reader, 1)  # all start when the parent closes its end
        os._exit(work())

    children = [fork(begin) for _ in range(n)]
    os.close(writer)
    os.close(reader)
    return sorted(ended(child) for child in children)


def test_training_under_one_name_at_once(course, ledger):
    for i in range(times(1, 3)):
        with ledger.attempt("two processes train under one name at once"):
            statuses = at_once(lambda i=i: verb("train", "tiny.yaml", "--name", f"x{i}")[0], 3)
            assert statuses == [0, 2, 2]
            course.check_end(Run(runs.ROOT / f"x{i}"))


def test_resuming_one_run_at_once(course, ledger):
    for i in range(times(1, 3)):
        run = copy_of(course.whole, f"x{i}")
        run.last.unlink()
        with ledger.attempt("two processes resume one run at once"):
            statuses = at_once(lambda i=i: verb("resume", f"x{i}")[0], 3)
            assert statuses == [0, 2, 2]
            course.check_end(run)


def test_a_run_that_is_being_trained_elsewhere_is_not_resumed(course, ledger):
    """It is refused in one line, may be read meanwhile, and comes to its end undisturbed."""
    reader, writer = os.pipe()
    original = Decoder.training_step

    def pause(module, batch, batch_idx):
        if module.global_step == 10:
            Path("paused").write_text("")
            os.read(reader, 1)
        return original(module, batch, batch_idx)

    def train() -> None:
        os.close(writer)
        Decoder.training_step = pause
        course.begin("elsewhere")

    child = fork(train)
    wait_for(Path("paused").exists, child)
    run = Run(runs.ROOT / "elsewhere")
    with ledger.attempt("resuming a run that is being trained elsewhere"):
        before = {path.name for path in run.path.iterdir()}
        line = refused("resume", "elsewhere")
        assert line == (
            f"error: {run.path}: another process is training this run; "
            "wait for its end, or stop it first"
        )
        assert {path.name for path in run.path.iterdir()} == before
        assert verb("sample", "elsewhere", "--tokens", "2")[0] == 0
        os.close(writer)
        assert ended(child) == 0
        course.check_end(run)


def test_a_killed_process_holds_no_lock(course):
    Path("lock").write_text("")  # as it left it
    run = copy_of(course.whole, "x")
    (run.path / ".lock").write_text("")
    run.last.unlink()
    course.go_on(run)
    course.check_end(run)


def _prepare_counted(arguments: list[str], all_are_here: Barrier) -> None:
    build = store.build

    def counted(*given):
        with open("built", "a") as file:
            file.write("x")
        build(*given)

    store.build = counted
    all_are_here.wait(60)
    sys.exit(verb(*arguments)[0])


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_preparing_one_corpus_at_once(course, ledger, kind):
    """One builds it, the others wait and open what it built.

    In processes begun anew: threads that train a tokenizer do not live on in a fork.
    """
    fresh = multiprocessing.get_context("spawn")
    for i in range(times(1, 4)):
        Path("built").write_text("")
        arguments = ["prepare", "tiny.yaml", f"data.cache=new{i}", f"data.tokenizer={kind}"]
        with ledger.attempt("two processes prepare one corpus at once"):
            work = arguments, fresh.Barrier(3)
            children = [fresh.Process(target=_prepare_counted, args=work) for _ in range(3)]
            for child in children:
                child.start()
            for child in children:
                child.join(120)
            assert [child.exitcode for child in children] == [0, 0, 0]
            assert Path("built").read_text() == "x"
            (folder,) = Path(f"new{i}").iterdir()
            assert store.open_corpus(folder).meta["tokenizer"] == kind


def test_a_preparer_that_is_killed_is_followed_by_the_one_that_waits(course, ledger, monkeypatch):
    build = store.build

    def stuck(*arguments):
        Path("begun").write_text("")
        signal.pause()

    def first() -> None:
        store.build = stuck
        verb("prepare", "tiny.yaml", "data.cache=new")

    with ledger.attempt("kill -9 in preparing, another process waiting"):
        killed = fork(first)
        wait_for(Path("begun").exists, killed)
        waiting = fork(lambda: os._exit(verb("prepare", "tiny.yaml", "data.cache=new")[0]))
        os.kill(killed, signal.SIGKILL)
        assert ended(killed) == -signal.SIGKILL and ended(waiting) == 0
        (folder,) = Path("new").iterdir()
        store.open_corpus(folder)
    assert store.build is build


@pytest.mark.parametrize(
    ("module", "part"),
    [*((building, part) for part in ("_read", "_tokenizer", "_write_meta")), (place, "sync")],
)
def test_killed_in_preparing(course, ledger, module, part):
    """Nothing under the final name, and the next one builds the same."""

    def die(*arguments, **named):
        os.kill(os.getpid(), signal.SIGKILL)

    def first() -> None:
        setattr(module, part, die)
        verb("prepare", "tiny.yaml", "data.cache=new")

    with ledger.attempt("kill -9 in preparing"):
        assert ended(fork(first)) == -signal.SIGKILL
        assert not [path for path in Path("new").iterdir() if not path.name.startswith(".")]
        assert verb("prepare", "tiny.yaml", "data.cache=new")[0] == 0
        (folder,) = [path for path in Path("new").iterdir() if not path.name.startswith(".")]
        assert store.open_corpus(folder).sha256 == course.corpus().sha256
