"""RESULTS.md, the figures and the README's verdicts, from committed results files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nano_moe.errors import UserError
from nano_moe.files import replacing, write_text
from nano_moe.studies import results
from nano_moe.studies.catalogue import STUDIES, Found, check_rule, everything
from nano_moe.studies.figures import UNITS, draw

BEGIN, END = "<!-- verdicts: written by make report -->", "<!-- end of verdicts -->"
RESULTS = "recipes/studies/results"
README = STUDIES.parent.parent / "README.md"
HEAD = """# Results

Written by `make report` from the results files beside it; every figure comes from a run of this
repository (`make reproduce`). A gain is positive, a factor (×) above 1, where the claim says so.
*Reproduced*: the 95 % interval of the gain excludes 0 and its mean is at least the smallest
effect that the study's file names; *reversed*: the same on the other side; *not reproduced*: the
interval lies within that effect on either side; else *undecided at this scale*. Intervals are
Student's t over differences paired by seed. *Could have seen*: the smallest mean that this n and
spread tell from zero. Losses are of the whole validation split. Seconds are of trainings of one
thread, side by side; memory is what a process came to hold beyond what it held at its start.
"""


def write(folder: Path = STUDIES, readme: Path = README) -> list[Path]:
    """Rewrite figures, RESULTS.md and the README's block; the files written."""
    found = [(one, results.read(one.results)) for one in everything(folder) if _has_results(one)]
    if not found:
        raise UserError(f"{folder / 'results'}: no results yet; run: make reproduce")
    for one, content in found:
        check_rule(one, content)
    written = []
    for one, content in found:
        picture = one.results.with_suffix(".png")
        with replacing(picture) as file:
            file.write(draw(content, one.study.figure))
        written.append(picture)
    document = folder / "results" / "RESULTS.md"
    write_text(document, "\n".join([HEAD, *(_section(one, content) for one, content in found)]))
    return [*written, document, *_into_readme(readme, found)]


def _has_results(found: Found) -> bool:
    return found.results.is_file()


# --- README --------------------------------------------------------------------------------------


def _into_readme(readme: Path, found: Sequence[tuple[Found, Mapping[str, Any]]]) -> Iterator[Path]:
    if not readme.is_file():
        return
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: the line '{BEGIN}' or '{END}' is missing; put it back")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(readme, f"{before}{BEGIN}\n{readme_block(found)}{END}{after}")
    yield readme


def readme_block(found: Sequence[tuple[Found, Mapping[str, Any]]]) -> str:
    """A row per study, its first comparison being the headline, and the first study's figure."""
    judged = [(one, content) for one, content in found if "comparisons" in content]
    if not judged:
        return ""
    rows = [
        (
            f"[{one.study.title}]({RESULTS}/RESULTS.md#{anchor(one.study.title)})",
            content["comparisons"][0]["says"],
            f"**{content['comparisons'][0]['verdict']}**",
            gain(content["comparisons"][0]),
            _could_have_seen(content["comparisons"][0]),
            _others(content["comparisons"][1:]),
        )
        for one, content in judged
    ]
    header = ("study", "claim", "verdict", "gain (95 %)", "could have seen", "its other claims")
    table = _table(header, rows)
    first = judged[0][0]
    return f"\n{table}\n![{first.study.title}]({RESULTS}/{first.name}.png)\n\n"


def _others(comparisons: Sequence[Mapping[str, Any]]) -> str:
    verdicts = [one["verdict"] for one in comparisons]
    counted = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)]
    return ", ".join(counted) or "–"


def anchor(title: str) -> str:
    """The name that a heading has in a link."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


# --- RESULTS.md ----------------------------------------------------------------------------------


def _section(found: Found, content: Mapping[str, Any]) -> str:
    study = found.study
    parts = [
        f"## {study.title}\n\n{study.question}\n",
        f"**Claim.** {study.claim} ({study.source})\n",
        f"**Answer.** {answer(content)}\n",
        _grid_table(content) if "grid" in content else _comparisons(content),
        f"![{study.title}]({found.name}.png)\n",
        _members(content),
    ]
    if "balance" in content:
        parts.insert(-1, _balance_table(content))
    if "step_times" in content:
        parts.append(_step_times(content["step_times"]))
    if study.caveats:
        parts.append("Caveats:\n\n" + "".join(f"- {one}\n" for one in study.caveats))
    parts.append(_provenance(found, content))
    return "\n".join(parts)


def answer(content: Mapping[str, Any]) -> str:
    """Two sentences: the headline, and what else the study found."""
    if "grid" in content:
        grid = content["grid"]
        best = [f"{row['best']:g} for {name}" for name, row in grid["members"].items()]
        edge = [name for name, row in grid["members"].items() if row["at_edge"]]
        found = f"At the edge of the grid: {', '.join(edge)}." if edge else "None is at an edge."
        return f"The best {grid['field']} is {', '.join(best)}. {found}"
    headline, *others = content["comparisons"]
    first = f"{headline['verdict'].capitalize()}: {headline['says']}; gain {gain(headline)}."
    return " ".join([first, *_share(content), *_other_verdicts(others)])


def _share(content: Mapping[str, Any]) -> Iterator[str]:
    if "recovered" not in content:
        return
    had = content["recovered"]
    if had is None:
        yield "The large dense model's own gain is not told from zero, so there is no share of it."
        return
    bounds = "" if had["low"] is None else f" ({had['low']:.0%} to {had['high']:.0%})"
    yield (
        f"`{had['part']}` has {had['mean']:.0%} of what `{had['whole']}` gains on "
        f"`{had['base']}`{bounds}, at {had['flops_share']:.0%} of its FLOPs."
    )


def _other_verdicts(others: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One sentence that names the other claims by verdict."""
    by_verdict: dict[str, list[str]] = {}
    for one in others:
        by_verdict.setdefault(one["verdict"], []).append(one["says"])
    if by_verdict:
        told = [f"*{verdict}*: {', '.join(says)}" for verdict, says in by_verdict.items()]
        yield f"Its other claims: {'; '.join(told)}."


def gain(one: Mapping[str, Any]) -> str:
    """A comparison's mean gain with its interval, n and unit."""
    if one["relative"]:
        mean, low, high = (None if one[k] is None else math.exp(one[k]) for k in KEYS)
        bounds = "" if low is None or high is None else f"{low:.2f} to {high:.2f}, "
        return f"× {mean:.2f} ({bounds}n = {one['n']})"
    bounds = "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}, "
    return f"{one['mean']:.3f} {UNITS[one['figure']]} ({bounds}n = {one['n']})"


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
            _could_have_seen(one),
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
    return _table(header, rows)


def _effect(one: Mapping[str, Any], value: float) -> str:
    return f"× {1 + value:g}" if one["relative"] else f"{value:g}"


def _could_have_seen(one: Mapping[str, Any]) -> str:
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
    return _table((f"`{grid['field']}`", *values), rows)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _members(content: Mapping[str, Any]) -> str:
    rows = []
    for name, cost in content["members"].items():
        runs = [run for run in content["runs"] if run["member"] == name]
        rows.append((name, *_costs(cost), *_outcomes(runs)))
    header = (
        "member", "parameters", "active", "FFN active", "routers", "million tokens", "TFLOPs",
        "CE", "bits per byte", "memory, GB", "seconds",
    )  # fmt: skip
    return _table(header, rows)


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
    return f"{note}\n{_table(header, rows)}"


def _first_over(layers: Mapping[str, Any]) -> str:
    """Of the seeds' mean, in training."""
    found = [
        (step, layer)
        for layer, band in layers.items()
        for step, mean in zip(band["at"], band["mean"], strict=True)
        if mean > OVER
    ]
    return "never" if not found else "{} (layer {})".format(*min(found))


def _step_times(times: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{one['rule']:g}", "{1:.2f} ({0:.2f} to {2:.2f})".format(*one["measured"]))
        for name, one in times.items()
    ]
    return (
        "A training step's time over the first member's, as the rule takes it, and measured after "
        "the runs (interleaved, all cores, quartiles):\n\n"
        + _table(("member", "rule", "measured"), rows)
        + "".join(f"\n{fault}\n" for fault in _too_kind(times))
    )


def _too_kind(times: Mapping[str, Any]) -> Iterator[str]:
    for name, one in times.items():
        if one["measured"][0] > one["rule"]:
            yield f"`{name}` takes longer here than its rule says: its verdict in time is too kind."


def _provenance(found: Found, content: Mapping[str, Any]) -> str:
    machine, seeds = content["machine"], sorted({run["seed"] for run in content["runs"]})
    commit = content["rule_commit"]
    rule = f"committed as {commit[:12]}" if commit else "not committed before the runs"
    return (
        f"Seeds {', '.join(map(str, seeds))}; {machine['cpu']}, {machine['cores']} cores, torch "
        f"{content['versions']['torch']}; rule `{content['rule'][:12]}`, {rule}. Raw figures: "
        f"[{found.name}.json]({found.name}.json); `make verify STUDY={found.name}` trains one run "
        "again.\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
