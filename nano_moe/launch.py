"""Start a training's processes on this node, and notice when one of them ends.

This process is the first of them and runs the command line again for each other one, with the
variables that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Where torchrun
or srun made the processes there is nothing to start, and they end them. No torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from nano_moe.config import Recipe

LEADER = "NANO_MOE_LEADER"  # the first process's id, told to those it starts
POLL, GRACE = 0.2, 5.0  # seconds between looks; and those left to a process to speak for itself
FAREWELL = 30.0  # seconds that the others may take to end after the first is done
ADVICE = "no run had begun, start it again"


def own_rank(recipe: Recipe) -> int:
    """This process's number among all, before they are in touch."""
    if not recipe.trainer.is_parallel:
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def under_slurm() -> bool:
    """Whether srun made this process, as one of several."""
    made = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    return made and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def count_started() -> int:
    """How many processes there are by the word of what made them; 1 where nothing says so."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ["SLURM_NTASKS"]) if under_slurm() else 1


def threads(n: int) -> int:
    """Of each of `n` processes on this node, unless OMP_NUM_THREADS says otherwise."""
    return max(1, (os.cpu_count() or 1) // n)


class Watch(threading.Thread):
    """Looks after the other processes; where one fell and this one does not end, ends it."""

    def __init__(self, others: Sequence[subprocess.Popen[bytes]] = (), leader: int | None = None):
        super().__init__(daemon=True)
        self.others, self.leader = others, leader
        self.fault: str | None = None
        self.advice = ADVICE
        self._fell, self._done = threading.Event(), threading.Event()

    def run(self) -> None:
        while not self._done.wait(POLL):
            self.fault = self._look()
            if self.fault is not None:
                self._fell.set()
                if not self._done.wait(GRACE):
                    self._end()
                return

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
            if other.poll():
                return f"process {number} of {len(self.others) + 1} {_ending(other.returncode)}"
        return None

    def _end(self) -> None:
        """This process hangs, perhaps in a message to the one that is gone."""
        if self.leader is None or os.environ["LOCAL_RANK"] == "1":
            os.write(2, f"\nerror: {self.fault}; {self.advice}\n".encode())
        kill(self.others)
        os._exit(1)


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
    outside = "RANK" in before or under_slurm()
    if not outside:
        os.environ.update(_variables(n))
    started = [] if outside else [_start(number, n, arguments) for number in range(1, n)]
    leader = int(before[LEADER]) if LEADER in before else None
    watch = Watch(started, leader)
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
