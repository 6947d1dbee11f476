"""Start a training's processes on this node, and notice when one of them ends.

This process is the first of them and runs the command line again for each other one, with the
variables that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Where torchrun
or srun made the processes there is nothing to start, and they end them. No torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from nano_moe.config import Recipe
from nano_moe.errors import UserError

LEADER = "NANO_MOE_LEADER"  # the first process's id, told to those it starts
POLL, GRACE = 0.2, 5.0  # seconds between looks; and those left to a process to speak for itself
FAREWELL = 30.0  # seconds that the others may take to end after the first is done
ADVICE = "nothing had begun, start it again"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = "interrupted"
STOPPED = {128 + number for number in STOPS}  # exit statuses


def own_rank(recipe: Recipe) -> int:
    """This process's number among all, before they are in touch."""
    if not recipe.trainer.is_parallel:
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def under_slurm() -> bool:
    """Whether srun made this process, as one of several."""
    # The body of a batch script has SLURM_PROCID, too, but is no step.
    step = {"SLURM_PROCID", "SLURM_STEP_ID"} <= os.environ.keys()
    return step and "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def count_started() -> int:
    """How many processes there are by the word of what made them; 1 where nothing says so."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ["SLURM_NTASKS"]) if under_slurm() else 1


def check_count(recipe: Recipe, devices: int | None = None) -> None:
    """Raises UserError where torchrun or srun, or their absence, are not what a recipe asks for.

    `devices` of a node, once it is known what `auto` stands for.
    """
    trainer, there = recipe.trainer, count_started()
    devices = devices or (None if trainer.devices == "auto" else trainer.devices)
    if trainer.nodes > 1 and there == 1:
        raise UserError(
            f"trainer.nodes: {trainer.nodes} nodes need torchrun or srun, which start the "
            "processes of each: nano_moe/training/README.md has the commands"
        )
    if devices is not None and _is_started() and there != devices * trainer.nodes:
        raise UserError(
            f"trainer.devices: {there} processes were started, and trainer.devices times "
            f"trainer.nodes is {devices * trainer.nodes}; make them equal"
        )


def _is_started() -> bool:
    """Whether torchrun, srun or a first process of ours made this one."""
    return "RANK" in os.environ or under_slurm()


def threads(n: int) -> int:
    """Of each of `n` processes on this node, unless OMP_NUM_THREADS says otherwise."""
    return max(1, (os.cpu_count() or 1) // n)


class Watch(threading.Thread):
    """Looks after the other processes; where one fell and this one does not end, ends it.

    And where Ctrl-C after another signal asks for it: while the main thread waits for a process
    that hangs, no handler of Python's runs.
    """

    def __init__(
        self,
        others: Sequence[subprocess.Popen[bytes]] = (),
        leader: int | None = None,
        ear: socket.socket | None = None,
    ):
        super().__init__(daemon=True)
        self.others, self.leader, self.ear = others, leader, ear
        self.fault: str | None = None
        self.status = 1  # what to end with
        self.advice = ADVICE
        self._heard: list[int] = []  # signals
        self._patient_until = math.inf
        self._fell, self._done = threading.Event(), threading.Event()

    def run(self) -> None:
        while not self._done.wait(POLL):
            self.fault = self._look()
            if self.fault is not None:
                self._fell.set()
                if not self._done.wait(GRACE):
                    self._end()
                return
            self._hear()

    def fell(self, seconds: float) -> str | None:
        """What happened to another process, if it is found to have ended so soon."""
        self._fell.wait(seconds)
        return self.fault

    def stop(self) -> None:
        self._done.set()

    def _look(self) -> str | None:
        if self.leader is not None:
            return None if os.getppid() == self.leader else f"process 0 ({self.leader}) is gone"
        for number, other in enumerate(self.others, 1):
            if other.poll() in STOPPED:
                self.status = other.returncode
                return INTERRUPTED
            if other.poll():
                return f"process {number} of {len(self.others) + 1} {_ending(other.returncode)}"
        return None

    def _hear(self) -> None:
        """Signals that were so long ago, and this process is still here."""
        if self.ear is None:
            return
        with contextlib.suppress(OSError):  # nothing is there, or this is the end
            heard = [number for number in self.ear.recv(64) if number in STOPS]
            self._heard += heard
            self._patient_until = time.monotonic() + GRACE if heard else self._patient_until
        if time.monotonic() < self._patient_until:
            return
        self._patient_until = math.inf
        last = signal.Signals(self._heard[-1])
        if len(self._heard) > 1 and last == signal.SIGINT:
            self.fault, self.status = INTERRUPTED, 128 + last
            self._end()
        told = f"{last.name}: the step is not at its end after {GRACE:g} seconds; one more Ctrl-C"
        _say(f"{told} ends all at once, and {self.advice}")

    def _end(self) -> None:
        """This process hangs, perhaps in a message to the one that is gone."""
        if self.leader is None or os.environ["LOCAL_RANK"] == "1":
            _say(f"{'' if self.fault == INTERRUPTED else 'error: '}{self.fault}; {self.advice}")
        kill(self.others)
        os._exit(self.status)


def _say(text: str) -> None:
    """On a line of its own, whatever the main thread is in."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"failed with exit status {status}"


@contextlib.contextmanager
def others(n: int, arguments: Sequence[str]) -> Iterator[Watch]:
    """`n` - 1 more processes of `nano_moe ARGUMENTS` for the time of the block.

    Started neither where torchrun or srun made them nor in one that was started here.
    """
    before = dict(os.environ)
    outside = _is_started()
    if not outside:
        os.environ.update(_variables(n))
    started = [] if outside else [_start(number, n, arguments) for number in range(1, n)]
    leader = int(before[LEADER]) if LEADER in before else None
    with _ear() as ear:
        watch = Watch(started, leader, ear if started else None)
        if started or leader is not None:
            watch.start()
        try:
            yield watch
            wait(started)
        finally:
            watch.stop()
            kill(started)
            if not outside:
                os.environ.clear()
                os.environ.update(before)


@contextlib.contextmanager
def _ear() -> Iterator[socket.socket | None]:
    """Where the number of every signal arrives that Python has a handler for, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    ear, mouth = socket.socketpair()
    with ear, mouth:
        ear.setblocking(False)
        mouth.setblocking(False)
        before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        try:
            yield ear
        finally:
            signal.set_wakeup_fd(before)


def _variables(n: int) -> dict[str, str]:
    """Of the first process of `n` on this node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": str(n)}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **numbers}


def _start(number: int, n: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    own = {"RANK": str(number), "LOCAL_RANK": str(number), LEADER: str(os.getpid())}
    environment = {"OMP_NUM_THREADS": str(threads(n)), **os.environ, **own}
    command = [sys.executable, "-m", "nano_moe", *arguments]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdin=silent, stdout=silent)


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until they have ended, or long enough."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(FAREWELL)


def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """They hold nothing that is not written: only the first process writes."""
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
