"""A study's section of RESULTS.md, from its results alone; with a second draw, both of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nano_moe.studies.balance_tables import balance_table
from nano_moe.studies.catalogue import Found
from nano_moe.studies.look_tables import look_tables
from nano_moe.studies.tables import table
from nano_moe.studies.time_tables import time_tables
from nano_moe.studies.units import unit_of, yardstick

UNDECIDED = "undecided at this scale"


def section(
    found: Found, content: Mapping[str, Any], again: Mapping[str, Any] | None = None
) -> str:
    """Heading to provenance; `again` are the results of the study that draws this one again."""
    study = found.study
    parts = [
        f"## {study.title}\n\n{study.question}\n",
        f"**Claim.** {study.claim} ({study.source})\n",
        f"**Answer.** {answer(content, again)}\n",
        _grid_table(content) if "grid" in content else _comparisons(content, again),
    ]
    if again is not None:
        parts.append(_both_draws(content, again))
    parts.append(f"![{study.title}]({found.name}.png)\n")
    if "grid" not in content and (routed := balance_table(content)):
        parts.append(routed)
    if "looks" in content:
        parts.append(look_tables(content))
    if "grid" not in content:
        parts.append(_members(content))
    if priced := list(price(content)):
        parts.append("What more compute bought:\n\n" + "\n".join(priced) + "\n")
    if "step_times" in content:
        parts.append(time_tables(content))
    if study.caveats:
        parts.append("Caveats:\n\n" + "".join(f"- {one}\n" for one in study.caveats))
    parts.append(_provenance(found, content))
    return "\n".join(parts)


def answer(content: Mapping[str, Any], again: Mapping[str, Any] | None = None) -> str:
    """The headline, and a line for each verdict of the other claims."""
    if "grid" in content:
        grid = content["grid"]
        best = [f"{row['best']:g} for {name}" for name, row in grid["members"].items()]
        edge = [name for name, row in grid["members"].items() if row["at_edge"]]
        found = f"At the edge of the grid: {', '.join(edge)}." if edge else "None is at an edge."
        return f"The best {grid['field']} is {', '.join(best)}. {found}"
    (headline, first, gained), *others = claims(content, again)
    told = f"{first.capitalize()}{_contrary(first)}: {headline['says']}; gain {gained}"
    named = ((one, verdict) for one, verdict, _ in others)
    return "\n\n".join(["; ".join([told, *_share(content)]) + ".", *_other_verdicts(named)])


def _contrary(verdict: str) -> str:
    return " (the contrary holds)" if verdict == "reversed" else ""


def claims(
    content: Mapping[str, Any], again: Mapping[str, Any] | None
) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """Each comparison, its final verdict, and its gain: of both draws where these disagree.

    A verdict that a second draw does not confirm is undecided.
    """
    for number, one in enumerate(content["comparisons"]):
        other = one if again is None else again["comparisons"][number]
        if one["verdict"] == other["verdict"]:
            yield one, one["verdict"], gain(one)
        else:
            draws = (f"{gain(draw)}: {draw['verdict']}" for draw in (one, other))
            yield one, UNDECIDED, "; a second draw: ".join(draws)


def _both_draws(content: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    rows = [
        (
            one["says"],
            *(f"{draw['verdict']}, {gain(draw)}" for draw in (one, other)),
            "held" if one["verdict"] == other["verdict"] else f"flipped: {UNDECIDED}",
        )
        for one, other in zip(content["comparisons"], again["comparisons"], strict=True)
    ]
    heads = [f"seeds {_all_of(of, 'seed')}, {_all_of(of, 'machine')}" for of in (content, again)]
    note = "Drawn twice, by one rule and with other seeds; a verdict stands where both draws agree."
    file = f"{again['study']}.json"
    return (
        f"{note} Raw figures of the second: [{file}]({file}).\n\n"
        f"{table(('claim', *heads, 'verdict'), rows)}"
    )


def _all_of(content: Mapping[str, Any], what: str) -> str:
    """Every value that runs have."""
    return ", ".join(map(str, sorted({run[what] for run in content["runs"]})))


def _share(content: Mapping[str, Any]) -> Iterator[str]:
    if "recovered" not in content:
        return
    had = content["recovered"]
    if had is None:
        yield "the large dense model's own gain is not told from zero, so there is no share of it"
        return
    bounds = "" if had["low"] is None else f" ({had['low']:.0%} to {had['high']:.0%})"
    share = f"{had['mean']:.0%}{bounds} of"
    if had["low"] is not None and had["low"] > 1:
        share = "more than all of"
    yield (
        f"that is {share} the {had['of']:.3f} that `{had['whole']}` gains on `{had['base']}`, at "
        f"{had['flops_share']:.0%} of its FLOPs"
    )


def _other_verdicts(others: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[str]:
    """A line for each verdict, with the other claims that it is of."""
    by_verdict: dict[str, list[str]] = {}
    for one, verdict in others:
        by_verdict.setdefault(verdict, []).append(one["says"])
    for verdict, says in by_verdict.items():
        yield f"*{verdict.capitalize()}*{_contrary(verdict)}: {'; '.join(says)}."


def gain(one: Mapping[str, Any]) -> str:
    """A comparison's mean gain with its interval, n and unit."""
    if one["relative"]:
        mean, low, high = (None if one[k] is None else math.exp(one[k]) for k in KEYS)
        bounds = "" if low is None or high is None else f"{low:.2f} to {high:.2f}, "
        return f"× {mean:.2f}{yardstick(one)} ({bounds}n = {one['n']})"
    bounds = "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}, "
    return f"{one['mean']:.3f} {unit_of(one)} ({bounds}n = {_count(one)})"


def _count(one: Mapping[str, Any]) -> str:
    """Of the gains: one a seed, or in a trend one a line and seed."""
    lines = len(one.get("lines", ()))
    if lines < 2:
        return str(one["n"])
    seeds = one["n"] // lines
    return f"{one['n']}, {lines} lines of {seeds} seed{'s' * (seeds > 1)}"


KEYS = ("mean", "low", "high")
PRICED = 1.05  # times the FLOPs: a router alone is no price


def _comparisons(content: Mapping[str, Any], again: Mapping[str, Any] | None) -> str:
    rows = [
        (
            one["says"],
            ", ".join(one["equal"]),
            gained,
            _effect(one, one["smallest_effect"]),
            detectable(one),
            f"**{verdict}**",
        )
        for one, verdict, gained in claims(content, again)
    ]
    header = (
        "claim",
        "held equal",
        "gain (95 %)",
        "smallest claimed",
        "detectable",
        "verdict",
    )
    return table(header, rows)


def price(content: Mapping[str, Any]) -> Iterator[str]:
    """A line per gain of a side that also computes more: what each TFLOP of it bought."""
    for one in content.get("comparisons", ()):
        better, than = (
            content["members"].get(one.get(side), {}).get("train_flops")
            for side in ("better", "than")
        )
        if (
            one["figure"] != "ce"
            or one["mean"] <= 0
            or not better
            or not than
            or better < PRICED * than
        ):
            continue
        more = (better - than) / 1e12
        yield f"- {one['says']}: {more:.1f} TFLOPs more, {one['mean'] / more:.4f} nats for each"


def _effect(one: Mapping[str, Any], value: float) -> str:
    return f"× {1 + value:g}" if one["relative"] else f"{value:g}"


def detectable(one: Mapping[str, Any]) -> str:
    seen = one["detectable"]
    if seen is None:
        return "–"
    return f"× {math.exp(seen):.2f}" if one["relative"] else f"{seen:.3f}"


def _grid_table(content: Mapping[str, Any]) -> str:
    grid = content["grid"]
    values = list(next(iter(grid["members"].values()))["ce"])
    rows = [
        (name, *(_bold(f"{ce:.3f}", float(v) == row["best"]) for v, ce in row["ce"].items()))
        for name, row in grid["members"].items()
    ]
    return table((f"`{grid['field']}`", *values), rows)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


SPEEDS = {"train_ms_per_token": "trained tokens/s", "decode_ms_per_token": "decoded tokens/s"}


def _members(content: Mapping[str, Any]) -> str:
    speeds = [name for name in SPEEDS if any(name in run for run in content["runs"])]
    most = max(Counter(run["member"] for run in content["runs"]).values())
    rows = []
    for name, cost in content["members"].items():
        runs = [run for run in content["runs"] if run["member"] == name]
        speed = (_speed(runs, s) for s in speeds)
        rows.append((_counted(name, len(runs), most), *_costs(cost), *_outcomes(runs), *speed))
    header = (
        "member", "parameters", "active", "FFN active", "routers", "million tokens", "TFLOPs",
        "CE", "bits per byte", "memory, GB", *(SPEEDS[speed] for speed in speeds),
    )  # fmt: skip
    return table(header, rows)


def _counted(member: str, n: int, most: int) -> str:
    """Its name, and how many runs it has where others have more."""
    return member if n == most else f"{member} (n = {n})"


def _speed(runs: Sequence[Mapping[str, Any]], figure: str) -> str:
    """Tokens per second, from the median of milliseconds per token."""
    values = [run[figure] for run in runs if figure in run]
    return f"{1e3 / statistics.median(values):,.0f}" if values else "–"


def _costs(cost: Mapping[str, Any]) -> list[str]:
    sizes = [f"{cost[key]:,}" for key in ("total", "active", "ffn_active", "router")]
    if cost["tokens"] is None:
        return [*sizes, "–", "–"]
    return [*sizes, f"{cost['tokens'] / 1e6:.2f}", f"{cost['train_flops'] / 1e12:.1f}"]


def _outcomes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over seeds, with the standard deviation of the loss; memory is a median."""
    cells = []
    for figure, digits in (("ce", 3), ("bpb", 3)):
        values = [run[figure] for run in runs if figure in run]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "–")
    memory = [run["memory_gb"] for run in runs if "memory_gb" in run]
    cells.append(f"{statistics.median(memory):.2f}" if memory else "–")
    return cells


def _provenance(found: Found, content: Mapping[str, Any]) -> str:
    runs, commit = content["runs"], content["rule_commit"]
    seeds, machines, torches = (_all_of(content, what) for what in ("seed", "machine", "torch"))
    recipes = (member["recipe"]["trainer"] for member in content["members"].values())
    precisions = " and ".join(sorted({trainer["precision"] for trainer in recipes}))
    rule = f"committed as {commit[:12]}" if commit else "not committed before the runs"
    dirty = sum(run["git_commit"].endswith("+dirty") for run in runs if run["git_commit"])
    changed = (
        f"{dirty} of {len(runs)} runs from sources with uncommitted changes; " if dirty else ""
    )
    named = "Seeds" if len({run["seed"] for run in runs}) > 1 else "Seed"
    return (
        f"{named} {seeds}; {precisions}; {machines}, torch {torches}; {changed}rule "
        f"`{content['rule'][:12]}`, {rule}. Raw figures: "
        f"[{found.name}.json]({found.name}.json); `make verify STUDY={found.name}` trains one run "
        "again.\n"
    )
