"""How long steps take in RESULTS.md, and what a verdict at equal time would be at other ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from nano_moe.studies.tables import table


def time_tables(content: Mapping[str, Any]) -> str:
    """The measured ratios beside the rule's, and gains at the measured ones."""
    times = content["step_times"]
    ruled = any(one["rule"] is not None for one in times.values())
    rows = []
    for name, one in times.items():
        rule = ("–" if one["rule"] is None else f"{one['rule']:g}",) if ruled else ()
        rows.append((name, *rule, "{1:.2f} ({0:.2f} to {2:.2f})".format(*one["measured"])))
    as_ruled = ", as the rule takes it, and" if ruled else ","
    head = (
        f"A training step's time over the first member's{as_ruled} measured after "
        "the runs (interleaved, all cores, quartiles):\n\n"
    )
    columns = ("member", "rule", "measured") if ruled else ("member", "measured")
    told = [*_elsewhere(times), *_at_measured(content)]
    return head + table(columns, rows) + "".join(f"\n{s}\n" for s in told)


def _elsewhere(times: Mapping[str, Any]) -> Iterator[str]:
    for name, one in times.items():
        if one["rule"] is None or one["measured"][0] <= one["rule"] <= one["measured"][2]:
            continue
        kind = "kind" if one["measured"][0] > one["rule"] else "hard"
        side = "longer" if kind == "kind" else "less long"
        yield f"`{name}` takes {side} here than its rule says: its verdict in time is too {kind}."


def _at_measured(content: Mapping[str, Any]) -> Iterator[str]:
    """A sentence per comparison at equal time whose better side was run for other steps, too."""
    for one in content["comparisons"]:
        better, than = one["better"], one["than"]
        twin = _twin(content["members"], better)
        if "time" not in one["equal"] or twin is None or than not in content["step_times"]:
            continue
        ratios = content["step_times"][better]["measured"]
        budget = _steps(content["members"][than])
        found = [(r, round(budget / r), _gain(content, one, twin, budget / r)) for r in ratios]
        told = "; ".join(f"{ratio:.2f}: {n} steps, {gain:+.3f}" for ratio, n, gain in found)
        yield (
            f"At the measured ratios `{better}` would have had other steps. Its gain there, "
            f"interpolated over the logarithm of steps between its runs and those of `{twin}`, "
            f"mean of the seeds: {told}."
        )


def _twin(members: Mapping[str, Any], name: str) -> str | None:
    """Another member of the same recipe for other steps; in a smoke test all have the same."""
    return next(
        (
            other
            for other, member in members.items()
            if _steps(member) != _steps(members[name])
            and _but_for_steps(member) == _but_for_steps(members[name])
        ),
        None,
    )


def _but_for_steps(member: Mapping[str, Any]) -> dict[str, Any]:
    recipe = member["recipe"]
    trainer = {name: value for name, value in recipe["trainer"].items() if name != "steps"}
    return {**recipe, "trainer": trainer}


def _steps(member: Mapping[str, Any]) -> int:
    return int(member["recipe"]["trainer"]["steps"])


def _gain(content: Mapping[str, Any], one: Mapping[str, Any], twin: str, steps: float) -> float:
    figures = {
        name: {run["seed"]: run[one["figure"]] for run in content["runs"] if run["member"] == name}
        for name in (one["better"], twin, one["than"])
    }
    ends = [math.log(_steps(content["members"][name])) for name in (one["better"], twin)]
    share = (math.log(steps) - ends[0]) / (ends[1] - ends[0])
    here, there, base = figures.values()
    return statistics.fmean(
        base[seed] - (here[seed] + share * (there[seed] - here[seed])) for seed in here
    )
