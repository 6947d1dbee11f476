"""From one command to the processes of a training, in touch with each other.

The first process leads: it alone reads a new corpus, claims the run folder, writes and speaks.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from nano_moe import launch, ranks
from nano_moe.config import Recipe
from nano_moe.device import choose_device, choose_devices, count_processes
from nano_moe.errors import SaidElsewhere, UserError
from nano_moe.runs import Run, resume_command

SILENCE = timedelta(minutes=10)  # of one process after which the others give up
PATIENCE = timedelta(days=7)  # for the first to read a corpus
NOTICE = 2.0  # seconds in which a lost connection is found to be an ended process
ROLL = 10.0  # seconds in which processes that are there say so, once one of them is missed
LOST = ("onnection", "imed out", "imeout", "gloo", "NCCL", "Broken pipe", "roadcast")

Made = TypeVar("Made")


class Job:
    """The processes of one training; without a group, this one alone."""

    def __init__(self, watch: launch.Watch | None = None):
        self.watch = watch
        self.leads = ranks.leads()
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE) if watch else None

    def agreed(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, on all; where it fails, all end, and it says why."""
        if self._patient is None:
            return make()
        box: list[Any] = [None, None]
        fault: Exception | None = None
        if self.leads:
            try:
                box[0] = make()
            except Exception as error:
                fault, box[1] = error, str(error)
        dist.broadcast_object_list(box, group=self._patient)
        if fault is not None:
            raise fault
        if box[1] is not None:
            raise SaidElsewhere(box[1])
        return box[0]

    def first(self, make: Callable[[], Made]) -> Made:
        """As each process makes it, once the first has: what it left on disk can be read."""
        if self._patient is None:
            return make()
        made: list[Made] = []
        self.agreed(lambda: made.append(make()))
        return made[0] if made else make()

    def advise(self, run: Run, recipe: Recipe) -> None:
        """What is said where another process ends."""
        if self.watch is not None:
            command = resume_command(run, recipe)
            self.watch.advice = f"{run.last} is whole, go on with: {command}"


@contextlib.contextmanager
def started(recipe: Recipe, arguments: Sequence[str]) -> Iterator[Job]:
    """The processes that a recipe asks for, in touch for the time of the block.

    `arguments` of the command line start the others, unless torchrun or srun did. Raises UserError
    where there are not as many as the recipe says, and where one of them ends.
    """
    if not recipe.trainer.is_parallel:
        launch.check_count(recipe)
        yield Job()
        return
    n = count_processes(recipe)
    with launch.others(choose_devices(recipe), arguments) as watch, _share_of_cores(watch):
        try:
            _connect(recipe, n)
            yield Job(watch)
            dist.destroy_process_group()
        except (RuntimeError, KeyboardInterrupt) as error:
            cause = _connection_fault(error)
            if cause is None:
                raise
            raise _lost(cause, watch) from error


@contextlib.contextmanager
def _share_of_cores(watch: launch.Watch) -> Iterator[None]:
    """As many threads for the first process as it told those that it started to take."""
    before = torch.get_num_threads()
    if watch.others and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(launch.threads(len(watch.others) + 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> ClusterEnvironment:
    """Who made the processes of this group, in the trainer's words."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if launch.under_slurm() else LightningEnvironment()


def _connect(recipe: Recipe, n: int) -> None:
    launch.check_count(recipe, choose_devices(recipe))
    if launch.under_slurm():
        _check_slurm(choose_devices(recipe), recipe.trainer.nodes)
        slurm = environment()
        os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
    gpu = choose_device(recipe).type == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, rank=launch.own_rank(recipe), world_size=n, timeout=SILENCE)


def _check_slurm(devices: int, nodes: int) -> None:
    """Raises UserError where the trainer would not take the variables that srun set."""
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "not set")
    there = os.environ.get("SLURM_NNODES", str(nodes))
    if (per_node, there) != (str(devices), str(nodes)):
        raise UserError(
            f"trainer.devices, trainer.nodes: {devices} on each of {nodes}, but "
            f"SLURM_NTASKS_PER_NODE is {per_node} and SLURM_NNODES {there}; start them with: "
            f"srun --nodes={nodes} --ntasks-per-node={devices}"
        )


def _connection_fault(error: BaseException | None) -> RuntimeError | None:
    """That others cannot be reached, if that is the fault, or what a signal cut short."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            return error
        error = error.__context__ if isinstance(error, KeyboardInterrupt) else None
    return None


def _lost(error: RuntimeError, watch: launch.Watch) -> BaseException:
    """What became of the others, where they cannot be reached."""
    if not watch.others and watch.leader is None:
        # torchrun and srun end all once one has ended; what is left of the time is for saying so.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fault = watch.fell(NOTICE)
    if fault == launch.INTERRUPTED:
        return KeyboardInterrupt()
    if fault is None and not dist.is_initialized():
        return _absent(error)
    if fault is None:
        there = _roll_call(str(error).splitlines()[0][:120])
        fault = _silent(there)
        speaks = ranks.rank() == min(there)
        if not speaks:
            time.sleep(ROLL)  # else our end would be taken for the fault
    else:
        speaks = watch.leader is None or os.environ["LOCAL_RANK"] == "1"
    if speaks and watch.leader is not None:
        os.write(2, b"\n")  # ends the line that the first process left
    return (UserError if speaks else SaidElsewhere)(f"{fault}; {watch.advice}")


def _roll_call(reason: str) -> dict[int, str]:
    """What is told by each process that misses another one; none of them is the one that hangs."""
    store = dist.distributed_c10d._get_default_store()
    told: dict[int, str] = {}

    def call() -> None:
        with contextlib.suppress(dist.DistError):  # process 0, which keeps the store, has ended
            store.set(f"missed/{ranks.rank()}", reason)
            time.sleep(ROLL)
            for n in range(ranks.count()):
                if store.check([f"missed/{n}"]):
                    told[n] = store.get(f"missed/{n}").decode()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(2 * ROLL)
    if thread.is_alive():
        reason = "Timed out asking process 0 who is there"
    return dict(told) or dict.fromkeys(range(1, ranks.count()), reason)


def _silent(there: dict[int, str]) -> str:
    """Of processes in touch, none of which is known to have ended.

    The first to time out closes its connections, which the others take for the fault.
    """
    missed = sorted(set(range(ranks.count())) - set(there))
    who = f"process {', '.join(map(str, missed))} of {ranks.count()}" if missed else "a process"
    for reason in there.values():
        if "imed out" in reason or "imeout" in reason:
            return f"{who} has been silent for {_minutes()} and may hang ({reason})"
    return f"{who} cannot be reached ({next(iter(there.values()))})"


def _absent(error: RuntimeError) -> UserError:
    """Of processes that never got in touch; the first counts them, the others miss the first."""
    counted = re.search(r"(\d+)/(\d+) clients joined", str(error))
    if counted is not None:
        what = f"{counted[1]} of {counted[2]} processes"
    elif isinstance(error, dist.DistNetworkError):
        what = f"no process 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    else:
        return SaidElsewhere(str(error))
    return UserError(
        f"trainer.devices: {what} got in touch within {_minutes()}; were all of them started, with "
        "srun or torchrun, and can the nodes reach each other?"
    )


def _minutes() -> str:
    return f"{SILENCE.total_seconds() / 60:g} minutes"
