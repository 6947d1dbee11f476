"""The studies of recipes/studies/: found by name, run, checked again, reported."""

from __future__ import annotations

import contextlib
import difflib
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nano_moe.bench.recipes import FOLDER, QUICK, text_folder
from nano_moe.bench.timing import QUICK as QUICK_TIMING
from nano_moe.errors import UserError
from nano_moe.runs import Run, write_json
from nano_moe.studies import clock, engine, results, tiers
from nano_moe.studies.plan import FLOPS_WITHIN, Planned, check_fair, plan
from nano_moe.studies.schema import FULL, Study, Value, load

STUDIES = FOLDER / "studies"
GRID = "learning-rates"
ROUNDING = 0.02  # nats that rounding on another machine may move a grid's run
SMOKE_WORDS, SMOKE_SEEDS = 5_000, 2


class Found(NamedTuple):
    """A study and where it lies; `small` is the one that a study of the gpu tier enlarges."""

    name: str
    path: Path
    study: Study
    small: Study | None = None

    @property
    def results(self) -> Path:
        results = self.path.parent / "results"
        return (results / tiers.GPU if self.small else results) / f"{self.name}.json"

    @property
    def larger(self) -> Found:
        """The same study in the gpu tier."""
        return self._replace(study=tiers.larger_study(self.study), small=self.study)

    def plan(self) -> list[Planned]:
        """Every run of it."""
        if self.small is not None:
            return tiers.larger_plan(self.path, self.small, FULL)
        return plan(self.path, self.study, FULL)

    def check_fair(self, planned: list[Planned]) -> None:
        """As `plan.check_fair`, by the tier's measure."""
        within = FLOPS_WITHIN if self.small is None else tiers.FLOPS_WITHIN
        check_fair(self.path, self.study, planned, flops_within=within)


class Place(NamedTuple):
    """Where smoke tests run, and the overrides that name their text."""

    root: Path
    text: Sequence[str]


class Outcome(NamedTuple):
    """What a run of a study came to: results, or the faults of the runs that failed."""

    results: dict[str, Any] | None
    failed: dict[str, str]


def find(name: str, folder: Path = STUDIES) -> Found:
    """The study of that name; raises UserError with near names."""
    path = folder / f"{name}.yaml"
    if name != path.stem or not path.is_file():  # a name, and no way to another folder
        names = sorted(p.stem for p in folder.glob("*.yaml") if p.is_file())
        close = difflib.get_close_matches(Path(name).stem, names, n=1, cutoff=0.5)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"
        raise UserError(f"study '{name}': no such study in {folder}; {known}")
    return Found(name, path, load(path))


def everything(folder: Path = STUDIES) -> list[Found]:
    """All studies in the order in which a reader would ask."""
    found = [find(path.stem, folder) for path in sorted(folder.glob("*.yaml"))]
    return sorted(found, key=lambda one: (one.study.order, one.name))


def in_running_order(studies: Sequence[Found]) -> list[Found]:
    """Grids first: the others take their best values."""
    return sorted(studies, key=lambda one: one.study.grid is None)


def run(found: Found, *, workers: int | None = None) -> Outcome:
    """Do what is left of a study and write its results file; none while runs are missing."""
    planned = found.plan()
    found.check_fair(planned)
    check_names(found)
    if found.small is None:  # the gpu tier's caveat says that it is not tuned
        check_tuned(found, planned)
    rule_commit = results.introduced(found.path, (found.small or found.study).rule)
    todo = engine.tasks(planned)
    failed = engine.run_all(found.name, todo, workers=workers)
    if failed:
        return Outcome(None, failed)
    content = results.collect(
        found.name, found.study, todo, small=found.small, rule_commit=rule_commit
    )
    found.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(found.results, content)
    if found.study.step_times or found.study.timed:
        content["step_times"] = clock.step_times(found.study, planned)
        write_json(found.results, content)
    return Outcome(content, {})


def costs(found: Found) -> dict[str, tuple[int, tiers.Cost]]:
    """How many runs each member that is trained has, and what one would take on a GPU."""
    planned = [one for one in found.plan() if not one.measure]
    runs = Counter(one.member for one in planned)
    recipes = {one.member: one.recipe for one in planned}
    return {member: (runs[member], tiers.cost(recipe)) for member, recipe in recipes.items()}


def collect(found: Found) -> dict[str, Any]:
    """Results anew from the runs that the results file names, whatever the sources are by now.

    Raises UserError where the rule has changed, or a run does not lie here.
    """
    stored = results.read(found.results)
    check_rule(found, stored)
    planned = plan(found.path, found.study, FULL)
    todo = _as_stored(found, stored, planned)
    content = results.collect(found.name, found.study, todo, rule_commit=stored["rule_commit"])
    if "step_times" in stored:
        content["step_times"] = stored["step_times"]
    write_json(found.results, content)
    return content


def _as_stored(
    found: Found, stored: dict[str, Any], planned: Sequence[Planned]
) -> list[engine.Task]:
    """The tasks under the keys that results name; raises UserError where one is not here."""
    keys = [_stored_run(stored, one, found)["key"] for one in planned]
    return engine.finished(engine.tasks(planned), keys)


def runs_of(found: Found) -> dict[str, Run]:
    """The study's runs that are finished here, by member and seed; raises UserError for none."""
    planned = [one for one in plan(found.path, found.study, FULL) if not one.measure]
    todo = engine.tasks(planned)
    if found.results.is_file() and not any(task.job.done for task in todo):
        todo = _as_stored(found, results.read(found.results), planned)
    done = {task.name: task.job.run for task in todo if task.job.done}
    if not done:
        raise UserError(
            f"{found.name}: none of its runs is in {engine.ROOT}; run: make reproduce "
            f"STUDY={found.name}"
        )
    return done


def check_tuned(found: Found, planned: Sequence[Planned]) -> None:
    """Raises UserError where a rate is not the best of its class's grid, nor within ROUNDING."""
    members = found.study.members.items()
    classes = {name: member.tuned_as for name, member in members if member.tuned_as is not None}
    if not classes:
        return
    grid = results.read(found.path.parent / "results" / f"{GRID}.json")["grid"]["members"]
    rates = {one.member: one.recipe.optim.lr for one in planned}
    for name, tuned_as in classes.items():
        best, losses = grid[tuned_as]["best"], grid[tuned_as]["ce"]
        lost = losses.get(f"{rates[name]:g}", math.inf) - losses[f"{best:g}"]
        if lost > ROUNDING:  # another machine's rounding may choose another of two near rates
            raise UserError(
                f"{found.path}: study.members.{name}: optim.lr is {rates[name]:g}, and {best:g} is "
                f"best for {tuned_as}; set it to that"
            )


def check_names(found: Found) -> None:
    """Raises UserError where it repeats no study, or a member's class is none of the grid's."""
    if found.study.repeats is not None:
        _check_repeats(found, find(found.study.repeats, found.path.parent))
    known = find(GRID, found.path.parent).study.members if found.name != GRID else {}
    for name, member in found.study.members.items():
        if member.tuned_as is not None and member.tuned_as not in known:
            raise UserError(
                f"{found.path}: study.members.{name}.tuned_as: {GRID}.yaml has no "
                f"'{member.tuned_as}'; there are {', '.join(known)}"
            )


def _check_repeats(found: Found, first: Found) -> None:
    """Raises UserError where a second draw has another rule than the first, or seeds of it."""
    where = f"{found.path}: study.repeats: {first.name}"
    one, other = (
        {**study.deciding(), "seeds": None, "repeats": None} for study in (found.study, first.study)
    )
    if one != other or first.study.repeats is not None:
        raise UserError(f"{where} has another rule; begin this file with base: {first.path.name}")
    again = sorted(set(found.study.seeds) & set(first.study.seeds))
    if again:
        raise UserError(f"{where} has seed {again[0]}, too; a second draw needs others")


@contextlib.contextmanager
def smoke_place() -> Iterator[Place]:
    """A temporary folder with a made-up text, for smoke tests that share their runs."""
    with text_folder(SMOKE_WORDS) as (folder, text):
        yield Place(folder / "studies", text)


def smoke(found: Found, place: Place) -> dict[str, Any]:
    """The same on models of a few weights and a made-up text, in this process; no verdicts."""
    check_names(found)
    few = found.study.model_copy(update={"seeds": found.study.seeds[:SMOKE_SEEDS]})
    check_fair(found.path, few, plan(found.path, few, FULL))
    planned = plan(found.path, few, {**FULL, **_small(place.text)})
    todo = engine.tasks(planned, place.root, smoke=True)
    threads = torch.get_num_threads()  # a job sets its own
    try:
        engine.run_here(todo)
    finally:
        torch.set_num_threads(threads)
    content = results.collect(found.name, few, todo, smoke=True)
    if few.step_times or few.timed:
        content["step_times"] = clock.step_times(few, planned, QUICK_TIMING)
    return content


def _small(text: Sequence[str]) -> dict[str, Value]:
    steps = ("trainer.steps=3", "trainer.log_every=1", "optim.warmup_steps=0")
    fields = (field.partition("=") for field in (*QUICK, *text, *steps))
    widths = "model.d_ff"  # what members differ in, and small at this d_model
    return {key: _plain(value) for key, _, value in fields if key != widths}


def _plain(value: str) -> Value:
    return int(value) if value.isdecimal() else value.strip('"')


def verify(found: Found, seed: int | None = None) -> dict[str, Any]:
    """Train one run of a study's results again, drawn at random, and compare its loss.

    Equal to the bit where machine and sources are the same, else within the smallest effect
    claimed. Raises UserError where the results are of another recipe, text or number of threads.
    """
    stored = results.read(found.results)
    check_rule(found, stored)
    planned = plan(found.path, found.study, FULL)
    one = random.Random(seed).choice(_verifiable(found, planned))
    before = _stored_run(stored, one, found)
    root = engine.ROOT / "verify"
    (task,) = engine.tasks([one], root)
    shutil.rmtree(task.job.folder, ignore_errors=True)
    _check_same(found, stored, before, task)
    failed = engine.run_all(f"verify {found.name}", [task])
    if failed:
        raise UserError(f"{task.name}: {failed[task.name]}")
    after = engine.read_result(task.job)
    shutil.rmtree(task.job.folder)
    return {"study": found.name, "run": task.name, **compared(found, before, after)}


def _verifiable(found: Found, planned: Sequence[Planned]) -> list[Planned]:
    """Runs with a loss that start from no other; raises UserError where there is none."""
    whole = [
        one
        for one in planned
        if not one.measure and one.source is None and one.recipe.model.is_causal
    ]
    if not whole:
        raise UserError(f"{found.path}: has no run with a loss to compare; verify another study")
    return whole


def _check_same(
    found: Found, stored: dict[str, Any], before: dict[str, Any], task: engine.Task
) -> None:
    """Raises UserError where a stored run is of another recipe, text or number of threads."""
    member = stored["members"][task.planned.member]
    here = {
        "recipe": results.what_runs(task.recipe),
        "text": task.corpus,
        "threads": task.job.threads,
    }
    there = {
        "recipe": results.as_now(member["recipe"]),
        "text": before["corpus"],
        "threads": member["threads"],
    }
    differs = [name for name in here if here[name] != there[name]]
    if differs:
        raise UserError(
            f"{found.results}: {task.name}: {' and '.join(differs)} changed since; run: make "
            f"reproduce STUDY={found.name}"
        )


def compared(found: Found, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """A stored run and the result of the same run again: whether it holds, and how exactly."""
    made_with = (after["machine"]["cpu"], after["versions"]["torch"])
    same_machine = made_with == (before["machine"], before["torch"])
    same_sources = after["key"] == before["key"]
    exact = after["ce"] == before["ce"]
    effects = [one.smallest_effect for one in found.study.comparisons if one.figure == "ce"]
    within = 0.0 if same_machine and same_sources else min(effects, default=ROUNDING)
    return {
        "stored": before["ce"],
        "again": after["ce"],
        "same_machine": same_machine,
        "same_sources": same_sources,
        "exact": exact,
        "holds": exact or abs(after["ce"] - before["ce"]) <= within,
    }


def check_rule(found: Found, stored: dict[str, Any]) -> None:
    """Raises UserError where results were read by another rule than the file states now."""
    if stored["rule"] != found.study.rule:
        raise UserError(
            f"{found.results}: by rule {stored['rule'][:12]}, and {found.path} states "
            f"{found.study.rule[:12]} now; undo the change, or run: "
            f"make reproduce STUDY={found.name}"
        )


def _stored_run(stored: dict[str, Any], planned: Planned, found: Found) -> dict[str, Any]:
    for run in stored["runs"]:
        if (run["member"], run["seed"]) == (planned.member, planned.seed):
            return run
    raise UserError(
        f"{found.results}: has no {planned.member}, seed {planned.seed}; run: "
        f"make reproduce STUDY={found.name}"
    )
