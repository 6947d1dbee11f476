"""From finished runs to a study's results: figures by seed, intervals, verdicts; one JSON file."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nano_moe import recipe_file
from nano_moe.accounting import count
from nano_moe.bench.machine import describe_machine
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.runs import git_commit, read_json, versions
from nano_moe.studies.engine import Task, read_result
from nano_moe.studies.plan import at, ffn_params
from nano_moe.studies.schema import Comparison, Recovered, Study, StudyFile
from nano_moe.studies.statistics import Interval, interval, verdict

WITHHELD = "withheld: a smoke test"
ELSEWHERE = ("machine", "versions", "curve", "balance")  # in other places of the file, or shorter


def collect(
    name: str,
    study: Study,
    done: Sequence[Task],
    *,
    rule_commit: str | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """All figures of a study whose runs are finished; `rule_commit` as it was before they began."""
    found = [(task, read_result(task.job)) for task in done]
    runs = [_run(task, result) for task, result in found]
    content: dict[str, Any] = {
        "study": name,
        "rule": study.rule,
        "rule_commit": rule_commit,
        "tier": "smoke" if smoke else "full",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "machine": describe_machine(),
        "versions": versions(),
        "members": {task.planned.member: _member(task) for task in done},
        "runs": runs,
    }
    if study.grid is not None:
        return {**content, "grid": _grid(study, runs)}
    by_member = _by_member(runs)
    content["comparisons"] = [compare(one, by_member, smoke) for one in study.comparisons]
    if study.recovered is not None:
        content["recovered"] = recovered(study.recovered, by_member, content["members"])
    content["curves"] = _curves(found)
    if study.figure == "balance":
        content["balance"] = _balance(found)
    return content


def _run(task: Task, result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in ELSEWHERE}
    made_with = {"machine": result["machine"]["cpu"], "torch": result["versions"]["torch"]}
    return {"member": task.planned.member, **kept, **made_with}


def _member(task: Task) -> dict[str, Any]:
    """What a member costs, from its recipe."""
    recipe = task.planned.recipe
    counted, ffn = count(recipe), ffn_params(recipe)
    tokens = recipe.trainer.steps * recipe.tokens_per_step
    return {
        "total": counted.total_params,
        "active": counted.active_params,
        "ffn_total": ffn.total,
        "ffn_active": ffn.active,
        "router": counted.router_params,
        "tokens": None if task.job.measure else tokens,
        "train_flops": None if task.job.measure else tokens * counted.train_flops_per_token,
        "forward_flops_per_token": counted.forward_flops_per_token,
        "threads": task.job.threads,
        "recipe": what_runs(recipe),
    }


def what_runs(recipe: Recipe) -> dict[str, Any]:
    """A member's resolved recipe, without the seed and where its text lies."""
    return recipe.model_dump(mode="json", exclude={"seed": True, "data": {"files", "cache"}})


def _by_member(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["member"], {})[run["seed"]] = run
    return found


def compare(
    comparison: Comparison, by_member: dict[str, dict[int, dict[str, Any]]], smoke: bool
) -> dict[str, Any]:
    """A comparison's gain per seed, its interval, and the verdict by the study's rule."""
    better, than = (by_member[side] for side in (comparison.better, comparison.than))
    gains = [
        _gain(comparison, better[seed][comparison.figure], than[seed][comparison.figure])
        for seed in better
    ]
    gain = interval(gains)
    effect = comparison.smallest_effect
    effect = math.log1p(effect) if comparison.relative else effect
    return {
        **comparison.model_dump(mode="json"),
        "gains": dict(zip(map(str, better), gains, strict=True)),
        **as_json(gain),
        "verdict": WITHHELD if smoke else verdict(gain, effect),
    }


def _gain(comparison: Comparison, better: float, than: float) -> float:
    return math.log(than / better) if comparison.relative else than - better


def as_json(of: Interval) -> dict[str, float | int | None]:
    """Bounds that a single difference does not have are null."""
    bounded = of.n > 1
    return {
        "mean": of.mean,
        "low": of.low if bounded else None,
        "high": of.high if bounded else None,
        "n": of.n,
        "smallest_seen": of.smallest_seen if bounded else None,
    }


def recovered(
    names: Recovered,
    by_member: dict[str, dict[int, dict[str, Any]]],
    members: dict[str, dict[str, Any]],
) -> dict[str, Any] | None:
    """The share of a gain in loss that the part has of the whole, and its share of the FLOPs.

    None where the whole's own gain is not told from zero.
    """
    sides = (by_member[name] for name in (names.base, names.part, names.whole))
    base, part, whole = ({seed: run["ce"] for seed, run in side.items()} for side in sides)
    if interval([base[seed] - whole[seed] for seed in base]).low <= 0:
        return None
    shares = {seed: (base[seed] - part[seed]) / (base[seed] - whole[seed]) for seed in base}
    flops = {name: members[name]["train_flops"] for name in (names.part, names.whole)}
    return {
        **names.model_dump(),
        "shares": {str(seed): share for seed, share in shares.items()},
        **as_json(interval(list(shares.values()))),
        "flops_share": flops[names.part] / flops[names.whole],
    }


def _grid(study: Study, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    """Each member's training loss over tokens: mean, lowest and highest of its seeds."""
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for task, result in found:
        if not task.job.measure:
            curves.setdefault(task.planned.member, []).append(result["curve"])
    return {member: _band(series) for member, series in curves.items()}


def _band(series: Sequence[Sequence[tuple[int, float]]]) -> dict[str, list[float]]:
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


# --- the rule ------------------------------------------------------------------------------------


def introduced(path: Path, rule: str) -> str | None:
    """The commit that brought a study file to this rule; None outside git, or if not committed."""
    commits = _git(path, "log", "--follow", "--format=%H", "--", path.name)
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
        return recipe_file.validate(
            recipe_file.parse(text, path.name), path.name, StudyFile
        ).study.rule
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
    if "runs" not in found or "rule" not in found:
        raise UserError(f"{path}: not results of a study; restore it, or delete it and run again")
    return found
