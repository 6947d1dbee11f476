"""From finished runs to a study's results: figures by seed, intervals, verdicts; one JSON file."""

from __future__ import annotations

import contextlib
import math
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nano_moe import recipe_file
from nano_moe.accounting import count
from nano_moe.bench.machine import describe_machine
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.runs import git_commit, read_json, versions
from nano_moe.studies import tiers
from nano_moe.studies.engine import Task, read_look, read_result
from nano_moe.studies.plan import at, ffn_params, train_flops
from nano_moe.studies.schema import Study, StudyFile
from nano_moe.studies.verdicts import compare, recovered, trend

ELSEWHERE = ("machine", "versions", "curve", "balance")  # in other places of the file, or shorter


Series = list[tuple[int, float]]  # (place, value)


def collect(
    name: str,
    study: Study,
    done: Sequence[Task],
    *,
    small: Study | None = None,
    rule_commit: str | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """All figures of a study whose runs are finished; `rule_commit` as it was before they began.

    `small` is the study that one of the gpu tier enlarges: the rule that was committed is its.
    """
    found = [(task, read_result(task.job)) for task in done]
    runs = [_run(task, result) for task, result in found]
    flops = {task.planned.member: train_flops(task.planned.recipe) for task in done}
    content: dict[str, Any] = {
        "study": name,
        "rule": (small or study).rule,
        "rule_commit": rule_commit,
        "tier": "smoke" if smoke else "full" if small is None else tiers.GPU,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "machine": describe_machine(),
        "versions": versions(),
        "members": {task.planned.member: _member(task, flops) for task in done},
        "runs": runs,
    }
    content |= judged(study, runs, content["members"], smoke=smoke)
    if study.grid is not None:
        return content
    content |= _curves(found)
    if study.figure == "balance":
        content["balance"] = _balance(found)
    if any(task.job.look for task in done):
        content["looks"] = _looks(done)
    return content


def _run(task: Task, result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in ELSEWHERE}
    if not task.job.measure:
        kept["dropped_share"] = _dropped(result["balance"])
    if task.job.look is not None:
        kept |= read_look(task.job)["figures"]
    made_with = {"machine": result["machine"]["cpu"], "torch": result["versions"]["torch"]}
    return {"member": task.planned.member, **kept, **made_with}


def _dropped(balance: dict[str, Any]) -> float:
    """Of assignments, in the last tenth of training, in the layer that dropped most; 0 if none."""
    layers = balance.get("dropped_share", {}).values()
    ends = [[share for _, share in series[-max(1, len(series) // 10) :]] for series in layers]
    return max((statistics.fmean(end) for end in ends), default=0.0)


def _member(task: Task, sources: dict[str, int]) -> dict[str, Any]:
    """What a member costs, from its recipe, with the training that it starts from."""
    recipe = task.planned.recipe
    counted, ffn = count(recipe), ffn_params(recipe)
    tokens = recipe.trainer.steps * recipe.tokens_per_step
    start = sources.get(task.planned.source[0]) if task.planned.source else None
    return {
        "total": counted.total_params,
        "active": counted.active_params,
        "ffn_total": ffn.total,
        "ffn_active": ffn.active,
        "router": counted.router_params,
        "tokens": None if task.job.measure else tokens,
        "train_flops": None if task.job.measure else train_flops(recipe) + (start or 0),
        "forward_flops_per_token": counted.forward_flops_per_token,
        "threads": task.job.threads,
        "recipe": what_runs(recipe),
    }


def what_runs(recipe: Recipe) -> dict[str, Any]:
    """A member's resolved recipe, without the seed and where its text lies."""
    return recipe.model_dump(mode="json", exclude={"seed": True, "data": {"files", "cache"}})


def as_now(stored: dict[str, Any]) -> dict[str, Any]:
    """A recipe in results as this version has it: fields that came later are at their defaults.

    Raises UserError where it has one that this version has not.
    """
    text = stored["data"]
    if not text["domains"] and not text["hub"]:  # then it was of files, whose place is left out
        text = {**text, "files": ["elsewhere"]}
    try:
        return what_runs(Recipe.model_validate({**stored, "data": text}))
    except ValidationError as error:
        raise UserError("its recipe is none of this version; run the study again") from error


def by_member(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The figures of runs by member and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["member"], {})[run["seed"]] = run
    return found


def judged(
    study: Study,
    runs: Sequence[dict[str, Any]],
    members: dict[str, dict[str, Any]],
    *,
    smoke: bool = False,
) -> dict[str, Any]:
    """What the rule says of runs: its grid, or its comparisons, trends and recovered share."""
    if study.grid is not None:
        return {"grid": grid(study, runs)}
    figures = by_member(runs)
    found: dict[str, Any] = {
        "comparisons": [
            *(compare(one, figures, smoke) for one in study.comparisons),
            *(trend(one, figures, smoke) for one in study.trends),
        ]
    }
    if study.recovered is not None:
        found["recovered"] = recovered(study.recovered, figures, members)
    return found


def grid(study: Study, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every member's loss at each value, the best value, and whether it lies at an edge."""
    assert study.grid is not None
    values = study.grid.values
    losses = {run["member"]: run["ce"] for run in runs}
    rows = {}
    for member in study.members:
        found = {f"{value:g}": losses[at(member, value)] for value in values}
        best = min(values, key=lambda value: found[f"{value:g}"])
        rows[member] = {"ce": found, "best": best, "at_edge": best in (values[0], values[-1])}
    return {"field": study.grid.field, "seed": study.seeds[0], "members": rows}


def _curves(found: Sequence[tuple[Task, dict[str, Any]]]) -> dict[str, Any]:
    """Each member's training loss over tokens, and its lead over the first member's: bands.

    A lead is of one seed, and so of the same batches; members of other budgets have none.
    """
    curves: dict[str, dict[int, Series]] = {}
    for task, result in found:
        if not task.job.measure:
            curves.setdefault(task.planned.member, {})[task.planned.seed] = result["curve"]
    if not curves:
        return {"curves": {}, "leads": {}}
    first, *others = curves
    leads = {
        member: [
            _lead(curves[first][seed], curve)
            for seed, curve in curves[member].items()
            if len(curve) == len(curves[first].get(seed, ()))
        ]
        for member in others
    }
    return {
        "curves": {member: _band(list(by_seed.values())) for member, by_seed in curves.items()},
        "leads": {member: _band(of) for member, of in leads.items() if of},
    }


def _lead(over: Series, of: Series) -> Series:
    return [(at, round(a - b, 4)) for (at, a), (_, b) in zip(over, of, strict=True)]


def _band(series: Sequence[Series]) -> dict[str, list[float]]:
    """Mean, lowest and highest of several series over the same points."""
    columns = list(zip(*series, strict=True))
    values = [[value for _, value in column] for column in columns]
    return {
        "at": [column[0][0] for column in columns],
        "mean": [round(statistics.fmean(of), 4) for of in values],
        "low": [min(of) for of in values],
        "high": [max(of) for of in values],
    }


def _balance(found: Sequence[tuple[Task, dict[str, Any]]]) -> dict[str, Any]:
    """Each member's balance figures over steps, by layer: mean, lowest and highest of its seeds."""
    members: dict[str, list[dict[str, Any]]] = {}
    for task, result in found:
        if result.get("balance"):
            members.setdefault(task.planned.member, []).append(result["balance"])
    return {
        member: {
            figure: {layer: _band([one[figure][layer] for one in balances]) for layer in layers}
            for figure, layers in balances[0].items()
        }
        for member, balances in members.items()
    }


def _looks(done: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """What lies behind the figures of a look, by member and seed."""
    found: dict[str, dict[str, Any]] = {}
    for task in done:
        if task.job.look is not None:
            details = read_look(task.job)["details"]
            found.setdefault(task.planned.member, {})[str(task.planned.seed)] = details
    return found


# --- the rule ------------------------------------------------------------------------------------


def introduced(path: Path, rule: str, at: str = "HEAD") -> str | None:
    """The commit that brought a study file to the rule that it has `at` a commit.

    None outside git, and where it has another one there.
    """
    base = recipe_file.parse(path.read_text(encoding="utf-8"), path.name).values.get("base")
    files = [at, "--follow", "--", path.name] if base is None else [at, "--", path.name, base]
    commits = _git(path, "log", "--format=%H", *files)
    oldest = None
    for commit in (commits or "").split():
        if _rule_at(path, commit) != rule:
            break
        oldest = commit
    return oldest


def _rule_at(path: Path, commit: str) -> str | None:
    text = _git(path, "show", f"{commit}:./{path.name}")
    if text is None:
        return None
    try:
        tree = recipe_file.parse(text, path.name)
        base = tree.values.pop("base", None)
        if base is not None:  # of a study that draws another one again
            under = _git(path, "show", f"{commit}:./{base}")
            tree = recipe_file.merge(recipe_file.parse(under or "", base), tree)
        return recipe_file.validate(tree, path.name, StudyFile).study.rule
    except UserError:
        return None


def _git(path: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(path.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def read(path: Path) -> dict[str, Any]:
    """A study's results file; raises UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no results yet; run: make reproduce STUDY={path.stem}")
    try:
        found = read_json(path)
    except UserError:
        found = {}
    kinds = {"rule": str, "runs": list, "members": dict}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path}: not results of a study; restore it, or delete it and run again")
    if found.get("tier") == "smoke":
        raise UserError(f"{path}: of a smoke test; restore it, or delete it and run again")
    return found


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Raises UserError where the results of this file lack, or hold otherwise, what is read."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); restore it, or run: make "
            f"reproduce STUDY={path.stem}"
        ) from error


def check_judged(path: Path, study: Study, stored: dict[str, Any]) -> None:
    """Raises UserError where gains and verdicts are not those that the stored runs give."""
    with whole(path):
        again = judged(study, stored["runs"], stored["members"])
    if not all(_alike(stored.get(name), value) for name, value in again.items()):
        raise UserError(
            f"{path}: its verdicts do not follow from its runs; restore it, or run: make "
            f"reproduce STUDY={path.stem}"
        )


def _alike(stored: Any, again: Any) -> bool:
    """Equal but for the last digits, which another machine may have otherwise."""
    if isinstance(again, dict):
        return isinstance(stored, dict) and all(
            _alike(stored.get(name), value) for name, value in again.items()
        )
    if isinstance(again, list | tuple):
        return (
            isinstance(stored, list)
            and len(stored) == len(again)
            and all(map(_alike, stored, again))
        )
    if isinstance(again, float) and isinstance(stored, int | float):
        return math.isclose(stored, again, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stored == again)
