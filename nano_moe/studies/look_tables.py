"""Tables of what was read from trained weights, of experts on disk and of exchanges."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nano_moe.studies.schema import DECODED, EXCHANGED, LOOKED
from nano_moe.studies.tables import table

FIRST = 1 / 5  # of training, at which a table tells how many choices are final


def look_tables(content: Mapping[str, Any]) -> str:
    """A table of the figures, and where experts were looked into, what lies behind them."""
    names = {name for runs in content["looks"].values() for run in runs.values() for name in run}
    parts = list(_figures(content))
    if "saturation" in names:
        parts += [_by_layer(content), *_top_tokens(content)]
    return "\n".join(parts)


def _figures(content: Mapping[str, Any]) -> Iterator[str]:
    for figures in (*LOOKED.values(), DECODED, EXCHANGED):
        rows = []
        for member in content["members"]:
            runs = [run for run in content["runs"] if run["member"] == member]
            if all(name in run for run in runs for name in figures):
                rows.append((member, *(_spread([run[name] for run in runs]) for name in figures)))
        if rows:
            yield table(("member", *(f"`{name}`" for name in figures)), rows)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _by_layer(content: Mapping[str, Any]) -> str:
    """Means over seeds: information less its shuffled floor, choices final early, and pairs."""
    rows = []
    for member, runs in content["looks"].items():
        for place, layer in enumerate(_layers(runs)):
            each = [run["layers"][place] for run in runs.values()]
            told = [
                statistics.fmean(one[name] - one[f"{name}_shuffled"] for one in each)
                for name in ("domain", "class")
            ]
            floors = [
                statistics.fmean(one[f"{name}_shuffled"] for one in each)
                for name in ("domain", "class")
            ]
            cells = [f"{bits:.3f} ({floor:.3f})" for bits, floor in zip(told, floors, strict=True)]
            final = statistics.fmean(_final_at(run["saturation"], place) for run in runs.values())
            pairs = statistics.fmean(max(map(max, one["coactivation"])) for one in each)
            chance = _pairs_by_chance(content["members"][member]["recipe"])
            rows.append((member, str(layer), *cells, f"{final:.2f}", f"{pairs:.2f} ({chance:.2f})"))
    header = (
        "member", "layer", "domain, bits (shuffled)", "class, bits (shuffled)",
        f"choices final at {FIRST:.0%}", "closest pair of experts (by chance)",
    )  # fmt: skip
    return table(header, rows)


def _pairs_by_chance(recipe: Mapping[str, Any]) -> float:
    moe = recipe["model"]["moe"]
    return float((moe["top_k"] - 1) / (moe["n_experts"] - 1))


def _layers(runs: Mapping[str, Any]) -> list[int]:
    return [one["layer"] for one in next(iter(runs.values()))["layers"]]


def _final_at(saturation: Mapping[str, Any], place: int) -> float:
    steps = saturation["steps"]
    nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - FIRST * steps[-1]))
    return float(saturation["layers"][place][nearest])


def _top_tokens(content: Mapping[str, Any]) -> Iterator[str]:
    """Of the first member and seed, the last layer."""
    member, runs = next(iter(content["looks"].items()))
    seed, run = next(iter(runs.items()))
    layer, experts = list(run["top_tokens"].items())[-1]
    rows = [
        (str(number), " ".join(_code(token) for token in tokens))
        for number, tokens in enumerate(experts)
    ]
    yield f"What goes to each expert most surely ({member}, layer {layer}, seed {seed}):\n"
    yield table(("expert", "tokens"), rows)


def _code(token: str) -> str:
    """As inline code in a cell of a table, with line ends and bars made visible."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("|", "¦").replace(" ", "␣")
    return f"`{shown.replace('`', 'ˋ')}`"
