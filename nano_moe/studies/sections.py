"""A study's section of RESULTS.md, from its results alone; with a second draw, both of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nano_moe.studies.catalogue import Found
from nano_moe.studies.look_tables import look_tables
from nano_moe.studies.schema import LOOKED
from nano_moe.studies.tables import table
from nano_moe.studies.time_tables import time_tables

UNDECIDED = "undecided at this scale"
UNITS = {
    "ce": "nats per token",
    "bpb": "bits per byte",
    "max_vio": "MaxVio",
    "max_share": "of assignments",
    "dead_experts": "experts",
    "starved_experts": "experts",
    "load_entropy": "load entropy",
    "dropped_share": "of assignments",
    "memory_gb": "GB",
    "train_ms_per_token": "ms per token",
    "decode_ms_per_token": "ms per token",
    "cold_ms_per_token": "ms per token",
    "half_speed_ms_per_token": "ms per token",
    "hits": "of calls",
    **dict.fromkeys(("exchange_bytes", "formula_bytes"), "bytes per token and layer"),
    **dict.fromkeys(("exchange_ms", "rest_ms", "step_ms"), "ms per step"),
    **dict.fromkeys(LOOKED["exchange"], "copies per token"),
    **dict.fromkeys(LOOKED["offload"], "of calls"),
    **dict.fromkeys(LOOKED["leak"], "nats per token"),
    "domain_information": "bits",
    "class_information": "bits",
    "token_information": "bits",
    "domain_share": "of the entropy",
    "class_share": "of the entropy",
}


def section(
    found: Found, content: Mapping[str, Any], again: Mapping[str, Any] | None = None
) -> str:
    """Heading to provenance; `again` are the results of the study that draws this one again."""
    study = found.study
    parts = [
        f"## {study.title}\n\n{study.question}\n",
        f"**Claim.** {study.claim} ({study.source})\n",
        f"**Answer.** {answer(content, again)}\n",
        _grid_table(content) if "grid" in content else _comparisons(content),
    ]
    if again is not None:
        parts.append(_both_draws(content, again))
    parts.append(f"![{study.title}]({found.name}.png)\n")
    if "balance" in content:
        parts.append(_balance_table(content))
    if "looks" in content:
        parts.append(look_tables(content))
    parts.append(_members(content))
    if "step_times" in content:
        parts.append(time_tables(content))
    if study.caveats:
        parts.append("Caveats:\n\n" + "".join(f"- {one}\n" for one in study.caveats))
    parts.append(_provenance(found, content))
    return "\n".join(parts)


def answer(content: Mapping[str, Any], again: Mapping[str, Any] | None = None) -> str:
    """Two sentences: the headline, and what else the study found."""
    if "grid" in content:
        grid = content["grid"]
        best = [f"{row['best']:g} for {name}" for name, row in grid["members"].items()]
        edge = [name for name, row in grid["members"].items() if row["at_edge"]]
        found = f"At the edge of the grid: {', '.join(edge)}." if edge else "None is at an edge."
        return f"The best {grid['field']} is {', '.join(best)}. {found}"
    headline = content["comparisons"][0]
    first, *verdicts = final_verdicts(content, again)
    told = f"{first.capitalize()}{_contrary(first)}: {headline['says']}; gain {gain(headline)}"
    others = zip(content["comparisons"][1:], verdicts, strict=True)
    return " ".join(["; ".join([told, *_share(content)]) + ".", *_other_verdicts(others)])


def _contrary(verdict: str) -> str:
    return " (the contrary holds)" if verdict == "reversed" else ""


def final_verdicts(content: Mapping[str, Any], again: Mapping[str, Any] | None) -> list[str]:
    """A verdict per claim; one that a second draw does not confirm is undecided."""
    first = [one["verdict"] for one in content["comparisons"]]
    if again is None:
        return first
    second = [one["verdict"] for one in again["comparisons"]]
    return [v if v == w else UNDECIDED for v, w in zip(first, second, strict=True)]


def _both_draws(content: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    rows = [
        (
            one["says"],
            *(f"{draw['verdict']}, {gain(draw)}" for draw in (one, other)),
            "held" if one["verdict"] == other["verdict"] else f"flipped: {UNDECIDED}",
        )
        for one, other in zip(content["comparisons"], again["comparisons"], strict=True)
    ]
    seeds = [
        ", ".join(str(seed) for seed in sorted({run["seed"] for run in of["runs"]}))
        for of in (content, again)
    ]
    header = ("claim", f"seeds {seeds[0]}", f"seeds {seeds[1]}", "verdict")
    note = "Drawn twice, by one rule and with other seeds; a verdict stands where both draws agree."
    return f"{note}\n\n{table(header, rows)}"


def _share(content: Mapping[str, Any]) -> Iterator[str]:
    if "recovered" not in content:
        return
    had = content["recovered"]
    if had is None:
        yield "the large dense model's own gain is not told from zero, so there is no share of it"
        return
    bounds = "" if had["low"] is None else f" ({had['low']:.0%} to {had['high']:.0%})"
    yield (
        f"that is {had['mean']:.0%}{bounds} of the {had['of']:.3f} that `{had['whole']}` gains on "
        f"`{had['base']}`, at {had['flops_share']:.0%} of its FLOPs"
    )


def _other_verdicts(others: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[str]:
    """One sentence that names the other claims by verdict."""
    by_verdict: dict[str, list[str]] = {}
    for one, verdict in others:
        by_verdict.setdefault(verdict, []).append(one["says"])
    if by_verdict:
        told = [f"*{v}*{_contrary(v)}: {', '.join(says)}" for v, says in by_verdict.items()]
        yield f"Its other claims: {'; '.join(told)}."


def gain(one: Mapping[str, Any]) -> str:
    """A comparison's mean gain with its interval, n and unit."""
    if one["relative"]:
        mean, low, high = (None if one[k] is None else math.exp(one[k]) for k in KEYS)
        bounds = "" if low is None or high is None else f"{low:.2f} to {high:.2f}, "
        return f"× {mean:.2f} ({bounds}n = {one['n']})"
    bounds = "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}, "
    unit = UNITS[one["figure"]] + (f" per {one['per']}" if "per" in one else "")
    return f"{one['mean']:.3f} {unit} ({bounds}n = {one['n']})"


KEYS = ("mean", "low", "high")
BALANCE = ("max_vio", "max_share", "starved_experts", "dead_experts", "load_entropy")
OVER = 2.0  # MaxVio: three times an even share


def _comparisons(content: Mapping[str, Any]) -> str:
    rows = [
        (
            one["says"],
            ", ".join(one["equal"]),
            gain(one),
            _effect(one, one["smallest_effect"]),
            could_have_seen(one),
            f"**{one['verdict']}**",
        )
        for one in content["comparisons"]
    ]
    header = (
        "claim",
        "held equal",
        "gain (95 %)",
        "smallest claimed",
        "could have seen",
        "verdict",
    )
    return table(header, rows)


def _effect(one: Mapping[str, Any], value: float) -> str:
    return f"× {1 + value:g}" if one["relative"] else f"{value:g}"


def could_have_seen(one: Mapping[str, Any]) -> str:
    seen = one["smallest_seen"]
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
    rows = []
    for name, cost in content["members"].items():
        runs = [run for run in content["runs"] if run["member"] == name]
        rows.append((name, *_costs(cost), *_outcomes(runs), *(_speed(runs, s) for s in speeds)))
    header = (
        "member", "parameters", "active", "FFN active", "routers", "million tokens", "TFLOPs",
        "CE", "bits per byte", "memory, GB", "seconds", *(SPEEDS[speed] for speed in speeds),
    )  # fmt: skip
    return table(header, rows)


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
    """Means over seeds, with the standard deviation of the loss; seconds and memory are medians."""
    cells = []
    for figure, digits in (("ce", 3), ("bpb", 3)):
        values = [run[figure] for run in runs if figure in run]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "–")
    for figure, digits in (("memory_gb", 2), ("seconds", 0)):
        values = [run[figure] for run in runs if figure in run]
        cells.append(f"{statistics.median(values):.{digits}f}" if values else "–")
    return cells


def _balance_table(content: Mapping[str, Any]) -> str:
    """Each member's routing at the end, and when a layer first sent an expert thrice its share."""
    rows = []
    for name, figures in content["balance"].items():
        runs = [run for run in content["runs"] if run["member"] == name]
        means = [statistics.fmean(run[figure] for run in runs) for figure in BALANCE]
        rows.append((name, *(f"{mean:.2f}" for mean in means), _first_over(figures["max_vio"])))
    header = ("member", *(f"`{name}`" for name in BALANCE), f"first step with MaxVio over {OVER:g}")
    note = (
        "Routing over the validation split: the worst layer, or experts of all; means over seeds.\n"
    )
    return f"{note}\n{table(header, rows)}"


def _first_over(layers: Mapping[str, Any]) -> str:
    """Of the seeds' mean, in training."""
    found = [
        (step, layer)
        for layer, band in layers.items()
        for step, mean in zip(band["at"], band["mean"], strict=True)
        if mean > OVER
    ]
    return "never" if not found else "{} (layer {})".format(*min(found))


def _provenance(found: Found, content: Mapping[str, Any]) -> str:
    runs, commit = content["runs"], content["rule_commit"]
    seeds, machines, torches = (
        ", ".join(map(str, sorted({run[what] for run in runs})))
        for what in ("seed", "machine", "torch")
    )
    recipes = (member["recipe"]["trainer"] for member in content["members"].values())
    precisions = " and ".join(sorted({trainer["precision"] for trainer in recipes}))
    rule = f"committed as {commit[:12]}" if commit else "not committed before the runs"
    return (
        f"Seeds {seeds}; {precisions}; {machines}, torch {torches}; rule "
        f"`{content['rule'][:12]}`, {rule}. Raw figures: "
        f"[{found.name}.json]({found.name}.json); `make verify STUDY={found.name}` trains one run "
        "again.\n"
    )
