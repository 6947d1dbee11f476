"""kill -9 at any moment: what is on disk is on course, and the end is the uninterrupted one."""

import contextlib
import os
import random
import select
import signal
import time

import pytest
import torch
from forking import ended, fork
from kit import STEPS, Course, copy_of, times

from nano_moe import checkpoints, runs
from nano_moe.runs import Run
from nano_moe.training.module import Decoder

pytestmark = pytest.mark.slow

KILLS = {"saving": "kill -9 inside a checkpoint's writing", "training": "kill -9 in training"}


class Child:
    """A fork that trains a run, or goes on with it, and says where it is through a pipe.

    "t": a step of training began; "w", "e": a checkpoint's writing began, ended.
    """

    def __init__(self, course: Course, run: Run, slow: bool):
        reader, writer = os.pipe()

        def work() -> None:
            os.close(reader)
            tell_steps(writer)
            if slow:
                slow_down_saving(writer)
            if run.has_begun:
                course.go_on(run)
            else:
                course.begin(run.name)

        self.id, self.said = fork(work), b""
        os.close(writer)
        self.reader = reader

    def hear(self, letter: bytes, seconds: float = 60.0) -> bool:
        """Wait until it says that; False when it ends before."""
        deadline = time.monotonic() + seconds
        while letter not in self.said and time.monotonic() < deadline:
            if not select.select([self.reader], [], [], 0.05)[0]:
                continue
            part = os.read(self.reader, 1 << 16)
            if not part:
                return False
            self.said += part
        return letter in self.said

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.id, signal.SIGKILL)
        status = ended(self.id)
        while part := os.read(self.reader, 1 << 16):
            self.said += part
        os.close(self.reader)
        return status


def tell_steps(writer: int) -> None:
    original = Decoder.training_step

    def training_step(module, batch, batch_idx):
        os.write(writer, b"t")
        return original(module, batch, batch_idx)

    Decoder.training_step = training_step


def slow_down_saving(writer: int) -> None:
    """Checkpoints take a third of a second, in small pieces, and so do their renames."""
    save, replace = torch.save, os.replace

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            time.sleep(0.001)
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    def slow_save(content, file):
        os.write(writer, b"w")
        save(content, Slow(file))

    def slow_replace(source, target):
        time.sleep(0.05)
        replace(source, target)
        time.sleep(0.05)
        if str(target).endswith("last.ckpt"):
            os.write(writer, b"e")

    torch.save, os.replace = slow_save, slow_replace


def killed(course: Course, run: Run, draw: random.Random, slow: bool) -> str | None:
    """Where a child was killed, "saving" or "training"; None when it came to its end."""
    slow = slow and run.has_begun  # a new run gets its first checkpoint quickly
    child = Child(course, run, slow)
    if child.hear(b"w" if slow else b"t"):
        time.sleep(draw.uniform(0, 0.4))
    status = child.kill()
    assert status in (0, -signal.SIGKILL)
    if status == 0:
        return None
    return "saving" if child.said.count(b"w") > child.said.count(b"e") else "training"


@pytest.mark.parametrize("slow", [False, True], ids=["training", "saving"])
def test_killed_again_and_again_it_stays_on_course(course, ledger, slow):
    draw, done, number = random.Random(int(slow)), 0, 0
    run = Run(runs.ROOT / "broken-0")
    wanted = times(5, 30)
    while done < wanted:
        place = killed(course, run, draw, slow)
        if not run.has_begun:  # before the first checkpoint there is nothing to go on from
            assert place is not None
            number += 1
            run = Run(runs.ROOT / f"broken-{number}")
            continue
        if place is None:
            course.check_end(run)
            number += 1
            run = Run(runs.ROOT / f"broken-{number}")
            continue
        done += 1
        with ledger.attempt(KILLS[place]):
            course.check(run)
    if run.has_begun and course.check(run) < STEPS:
        course.go_on(run)
        course.check_end(run)


def test_killed_between_the_two_renames_the_one_before_is_taken(course, ledger):
    """The moment at which there is no last.ckpt at all; made by hand, nothing is killed."""
    run = copy_of(course.whole, "broken")
    run.last.unlink()
    found = checkpoints.newest(run)
    assert found.path == run.previous and "last.ckpt: no such checkpoint" in found.warning
    with ledger.attempt("between a checkpoint's two renames: resume takes previous.ckpt"):
        course.go_on(run)
        course.check_end(run)
