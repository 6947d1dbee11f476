"""Runs what a study plans and no run twice: cached by key, resumed where stopped, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nano_moe import recipe_file, runs
from nano_moe.bench.file_cache import check_can_be_emptied
from nano_moe.bench.machine import n_cores
from nano_moe.config import Recipe
from nano_moe.device import check_memory, choose_device
from nano_moe.errors import UserError
from nano_moe.files import make_folder
from nano_moe.studies.keys import run_key
from nano_moe.studies.plan import Planned, train_flops
from nano_moe.studies.schema import ALL
from nano_moe.studies.worker import Job, work
from nano_moe.text.store import prepare

ROOT = runs.ROOT / "studies"
TRAIN_THREADS = 1  # two such runs side by side are 1.0 (dense) to 1.1 times as fast as one of two
LOG = "worker.log"
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Task:
    """A planned run, the recipe that it trains on which text, and the job that does it."""

    planned: Planned
    recipe: Recipe
    corpus: str | None  # its sha256
    job: Job

    @property
    def name(self) -> str:
        return f"{self.planned.member}, seed {self.planned.seed}"

    @property
    def cost(self) -> int:
        """Training FLOPs, for the share that is done."""
        share = 1 / self.recipe.trainer.steps if self.job.measure else 1
        return int(train_flops(self.recipe) * share)

    def spent(self) -> float:
        """Share of the steps that are done."""
        if self.job.done:
            return 1.0
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = self.job.run.metrics_file.read_text(encoding="utf-8").splitlines()[-1]
            return min(int(last.split(",")[0]) / self.recipe.trainer.steps, 1.0)
        return 0.0


def tasks(planned: Sequence[Planned], root: Path = ROOT, *, smoke: bool = False) -> list[Task]:
    """The jobs of a plan; members that resolve to one recipe share one. Prepares the text.

    Raises UserError where a run would not fit into memory or its text cannot be prepared.
    """
    corpora: dict[str, str] = {}
    folders: dict[str, Path] = {}
    found: dict[tuple[str, int], Task] = {}
    for one in sorted(planned, key=lambda one: one.source is not None):
        recipe = one.recipe if one.source is None else _from(one.recipe, found[one.source])
        check_memory(recipe)
        corpus = None if one.measure else _corpus(recipe, corpora, progress=not smoke)
        threads = n_cores() if one.measure and not smoke else TRAIN_THREADS
        watch = one.look == "specialization"
        budget, ranks = one.expert_budget, one.expert_ranks
        key = run_key(
            recipe, corpus, threads, measure=one.measure, watch=watch, expert_budget=budget,
            expert_ranks=ranks,
        )  # fmt: skip
        if key not in folders:  # the same run may lie there under another recipe's name
            lies = next(root.glob(f"*-{key}"), None)
            folders[key] = lies or root / f"{one.stem}-{recipe.seed}-{key}"
        job = Job(str(folders[key]), key, threads, one.measure, one.look, budget, ranks)
        found[one.member, one.seed] = Task(one, recipe, corpus, job)
    return [found[one.member, one.seed] for one in planned]


def finished(planned: Sequence[Task], keys: Sequence[str]) -> list[Task]:
    """The tasks as they were done under these keys; raises UserError where one is not here."""
    found = []
    for task, key in zip(planned, keys, strict=True):
        folder = next(ROOT.glob(f"*-{key}"), ROOT / key)
        job = dataclasses.replace(task.job, folder=str(folder), key=key)
        if not job.done:
            raise UserError(f"{task.name}: its run {key} is not in {ROOT}; its results stay")
        found.append(dataclasses.replace(task, job=job))
    return found


def _from(recipe: Recipe, source: Task) -> Recipe:
    """The recipe with the folder of the run that it starts from."""
    assert recipe.model.moe is not None
    moe = recipe.model.moe.model_copy(update={"init_from": source.job.folder})
    model = recipe.model.model_copy(update={"moe": moe})
    return recipe.model_copy(update={"model": model})


def _corpus(recipe: Recipe, corpora: dict[str, str], *, progress: bool) -> str:
    """The sha256 of a recipe's prepared text, each text being prepared once."""
    model = recipe.model
    asked = f"{recipe.data.model_dump_json()} {model.vocab_size} {model.context}"
    if asked not in corpora:
        corpora[asked] = prepare(
            recipe.data, model.vocab_size, model.context, progress=progress
        ).sha256
    return corpora[asked]


def read_result(job: Job) -> dict[str, Any]:
    """The figures of a finished job; raises UserError where they are damaged."""
    try:
        found = runs.read_json(job.result)
    except UserError:
        found = {}
    needed = {"seed", "machine", "versions"} | (set() if job.measure else {"curve", "balance"})
    if found.get("key") != job.key or not needed <= set(found):
        raise UserError(f"{job.result}: damaged, or of another run; delete it and run again")
    return found


def read_look(job: Job) -> dict[str, Any]:
    """What the look at a finished job found; raises UserError where it is damaged."""
    try:
        return runs.read_json(job.looked)
    except UserError:
        raise UserError(f"{job.looked}: damaged; delete it and run again") from None


def run_all(study: str, todo: Sequence[Task], *, workers: int | None = None) -> dict[str, str]:
    """Do every task that has no result yet; the faults of those that failed, by the run's name.

    Trainings go side by side, those that start from another after it, measurements one by one.
    Passes a KeyboardInterrupt on when all workers have stopped with a checkpoint. Raises UserError
    where one of them would be of a cold cache that does not empty.
    """
    by_look = sorted(todo, key=lambda task: task.job.look is not None)  # a look counts as more
    distinct = {task.job.folder: task for task in by_look}
    waiting = [task for task in distinct.values() if not task.job.done]
    measured = [task for task in waiting if task.job.measure]
    trainings = [task for task in waiting if not task.job.measure]
    _check_cold(measured)
    stages = [[task for task in trainings if bool(task.planned.source) == last] for last in (0, 1)]
    failed: dict[str, str] = {}
    with _alone() as lock, _Progress(study, list(distinct.values())) as progress:
        for stage in stages:
            failed |= _side_by_side(stage, workers or _workers(stage), progress, lock)
        failed |= _side_by_side(measured, 1, progress, lock)
    return failed


def _check_cold(measured: Sequence[Task]) -> None:
    """Before the trainings, and not after them."""
    cold = [task.job.run.path for task in measured if task.job.expert_budget not in (None, ALL)]
    for folder in {path.parent for path in cold}:
        make_folder(folder)
        check_can_be_emptied(folder)


def run_here(todo: Sequence[Task]) -> None:
    """The same in this process, one after the other: for runs of seconds."""
    for task in sorted(todo, key=lambda task: task.planned.source is not None):
        if not task.job.done:
            _claim(task)
            work(task.job)


def _workers(todo: Sequence[Task]) -> int:
    on_gpu = any(choose_device(task.recipe).type == "cuda" for task in todo)
    return 1 if on_gpu else max(1, n_cores() // TRAIN_THREADS)


def _side_by_side(
    todo: Sequence[Task], at_once: int, progress: _Progress, lock: int
) -> dict[str, str]:
    waiting, running = list(todo), dict[Task, subprocess.Popen[bytes]]()
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.pop(0)
                try:
                    running[task] = _start(task, lock)
                except UserError as error:
                    failed[task.name] = str(error)
            time.sleep(POLL)
            for task, process in list(running.items()):
                if process.poll() is not None:
                    del running[task]
                    if not task.job.done:
                        failed[task.name] = _fault(task, process.returncode)
            progress.update([task.name for task in running])
    finally:
        _stop(running.values())
    return failed


def _start(task: Task, *held: int) -> subprocess.Popen[bytes]:
    """The worker, which holds these open files, too, and so their locks, when we are killed."""
    _claim(task)
    threads = str(task.job.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    command = [sys.executable, "-m", "nano_moe.studies.worker"]
    with open(Path(task.job.folder) / LOG, "wb") as log:
        return subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(task.job))],
            stdin=subprocess.PIPE,  # held open: the worker stops when we are gone
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
            pass_fds=held,
        )


def _claim(task: Task) -> None:
    """Make the run's folder; one that a killed run left without a checkpoint is begun anew."""
    folder = Path(task.job.folder)
    if folder.exists() and not (task.job.run.has_begun or task.job.result.is_file()):
        shutil.rmtree(folder)
    if not folder.exists():
        runs.create(task.recipe, stem=task.planned.stem, name=folder.name, root=folder.parent)
    written = recipe_file.load(task.job.run.recipe_file)
    if written != task.recipe:
        raise UserError(
            f"{task.job.run.recipe_file}: was changed since the study wrote it; delete {folder}"
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]] | Any) -> None:
    """Let every worker end its step and save, then wait for all."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()
    for process in left:
        process.wait()


def _fault(task: Task, status: int) -> str:
    """The last line that the worker wrote, where the others are, and the way out."""
    log = Path(task.job.folder) / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = lines[-1].removeprefix("error: ")[:300] if lines else f"exit status {status}"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; it goes on where it stopped"
    return f"{said}; all of it: {log}; delete {task.job.folder} to begin this run anew"


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """A lock's open file; raises UserError where another study runs here: they would share runs."""
    make_folder(ROOT)
    with open(ROOT / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{ROOT}: another study is running here, or a stopped one still saves; wait for "
                "its end"
            ) from None
        yield lock.fileno()


class _Progress:
    """One line on stderr: the study, runs done of all, what is running, time left."""

    def __init__(self, study: str, all_tasks: Sequence[Task]):
        self.study, self.tasks = study, all_tasks
        self.total = sum(task.cost for task in all_tasks)

    def __enter__(self) -> _Progress:
        self.bar = tqdm(
            total=self.total,
            initial=self._done(),
            desc=self.study,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left {postfix}",
            dynamic_ncols=True,
            miniters=0,
            mininterval=POLL if sys.stderr.isatty() else 60,  # a log file needs few lines
        )
        self.update([])
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, running: Sequence[str]) -> None:
        finished = sum(task.job.done for task in self.tasks)
        names = f": {' | '.join(running)}" if running else ""
        self.bar.set_postfix_str(f"run {finished} of {len(self.tasks)} done{names}", refresh=False)
        self.bar.update(self._done() - self.bar.n)

    def _done(self) -> float:
        return sum(task.cost * task.spent() for task in self.tasks)
