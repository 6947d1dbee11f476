"""Signals and terminals: the step is ended, the state kept, the status the shell's."""

import os
import pty
import random
import select
import signal
import sys
import time

import pytest
from forking import ended, fork
from kit import copy_of, times

from nano_moe import runs
from nano_moe.cli.main import main
from nano_moe.runs import Run
from nano_moe.training.module import Decoder

pytestmark = pytest.mark.slow

STOPS = {
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM, then SIGINT": [signal.SIGTERM, signal.SIGINT],
    "SIGHUP": [signal.SIGHUP],
}


def announced(writer: int) -> None:
    """Say through a pipe that training has begun; steps take a moment, so that none is missed."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests
    original = Decoder.training_step

    def training_step(module, batch, batch_idx):
        os.write(writer, b"t")
        time.sleep(0.01)
        return original(module, batch, batch_idx)

    Decoder.training_step = training_step


def leave(arguments: list[str]) -> None:
    """End this process with a verb's status; a Ctrl-C that comes after it changes nothing."""
    try:
        status = main(arguments)
    except KeyboardInterrupt:
        status = 130
    os._exit(status)


def listen(reader: int, seconds: float) -> None:
    """Until the child trains, and a random moment more."""
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b"t"
    time.sleep(seconds)


def go_on(course, run: Run) -> None:
    course.check(run)
    course.go_on(run)
    course.check_end(run)


@pytest.mark.parametrize("stop", STOPS)
def test_a_signal_ends_training_with_its_state_kept(course, ledger, stop):
    draw = random.Random(stop)
    for i in range(times(1, 3)):
        run = Run(runs.ROOT / f"x{i}")
        reader, writer = os.pipe()

        def work(writer=writer, run=run) -> None:
            announced(writer)
            leave(["train", "tiny.yaml", "--name", run.name])

        child = fork(work)
        os.close(writer)
        listen(reader, draw.uniform(0, 0.3))
        for number in STOPS[stop]:
            os.kill(child, number)
            time.sleep(draw.uniform(0, 0.02))
        status = ended(child)
        os.close(reader)
        with ledger.attempt(stop):
            assert status in {128 + number for number in STOPS[stop]}
            go_on(course, run)


def test_a_terminal_that_closes_ends_training_with_its_state_kept(course, ledger):
    """A login shell's end: SIGHUP comes, and nothing can be written any more."""
    draw = random.Random(0)
    for i in range(times(1, 3)):
        run = Run(runs.ROOT / f"x{i}")
        reader, writer = os.pipe()
        child, terminal = pty.fork()
        if child == 0:
            try:
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
                announced(writer)
                leave(["train", "tiny.yaml", "--name", run.name])
            finally:
                os._exit(99)
        os.close(writer)
        listen(reader, draw.uniform(0, 0.3))
        os.close(terminal)
        status = ended(child)
        os.close(reader)
        with ledger.attempt("terminal closed"):
            assert status == 128 + signal.SIGHUP
            go_on(course, run)


def test_under_nohup_a_closed_terminal_changes_nothing(course):
    run = copy_of(course.whole, "x")
    run.last.unlink()

    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        original = Decoder.training_step

        def training_step(module, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGHUP)
            return original(module, batch, batch_idx)

        Decoder.training_step = training_step
        course.go_on(run)

    assert ended(fork(work)) == 0
    course.check_end(run)
