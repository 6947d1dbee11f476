"""What `bench offload` draws: memory, hits and speed over the budget, a row of panels per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context

from nano_moe.plotting import COLOURS, HATCHES, LINES, MARKERS, STYLE, png

WIDTH, HEIGHT = 10.0, 3.6  # inches, of a row
AHEAD = "lru, read ahead"  # how every budget is measured
BAR = 6  # of the budget's per cent


def draw(per_run: Sequence[Sequence[Mapping[str, Any]]]) -> bytes:
    """The benchmark's rows as PNG, those of each run together."""
    with context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(per_run)), layout="constrained")
        panels = figure.subplots(len(per_run), 3, squeeze=False)
        for found, (memory, hits, speed) in zip(per_run, panels, strict=True):
            budgets = [row for row in found if row["policy"] == AHEAD]
            (resident,) = (row for row in found if row["budget"] == "none")
            _memory(memory, budgets, resident)
            _hits(hits, budgets, [row for row in found if row["policy"] not in (AHEAD, None)])
            _speed(speed, budgets, resident)
            hits.set_title(found[0]["run"])
            for panel in (memory, hits, speed):
                panel.set_xlabel("budget, % of the experts")
        return png(figure)


def _share(row: Mapping[str, Any]) -> float:
    return float(row["budget"].removesuffix("%"))


def _memory(axes: Axes, budgets: Sequence[Mapping[str, Any]], resident: Mapping[str, Any]) -> None:
    """Growth of resident memory, of the process's own below that of mapped files."""
    at, below = [_share(row) for row in budgets], [0.0] * len(budgets)
    for number, part in enumerate(("anonymous", "from files")):
        grown = [max(0.0, row[f"{part}, GB"]) for row in budgets]
        axes.bar(
            at, grown, BAR, below, label=part, color=COLOURS[number], edgecolor="black",
            hatch=HATCHES[number],
        )  # fmt: skip
        below = [low + more for low, more in zip(below, grown, strict=True)]
    whole = resident["anonymous, GB"] + resident["from files, GB"]
    axes.axhline(whole, color="0.4", ls=LINES[1], label="no budget")
    axes.set_ylabel("resident memory, GB")
    _legend(axes)


def _hits(
    axes: Axes, budgets: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> None:
    """Calls that found their expert; of other policies at the budget they were measured at."""
    at = [_share(row) for row in budgets]
    hits = [row["hits"] for row in budgets]
    axes.plot(at, hits, label=AHEAD, color=COLOURS[0], marker=MARKERS[0])
    axes.plot([0, 100], [0, 1], color="0.4", ls=LINES[1], label="their share in memory")
    for number, row in enumerate(others, start=1):
        axes.plot(
            [_share(row)], [row["hits"]], MARKERS[number], label=row["policy"], mfc="none",
            color=COLOURS[number],
        )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("hits, share of calls")
    _legend(axes)


def _speed(axes: Axes, budgets: Sequence[Mapping[str, Any]], resident: Mapping[str, Any]) -> None:
    for number, cache in enumerate(("warm", "cold")):
        measured = [row for row in budgets if row[f"tokens/s, {cache}"] is not None]
        axes.plot(
            [_share(row) for row in measured], [row[f"tokens/s, {cache}"] for row in measured],
            label=f"{cache} cache of the file", color=COLOURS[number], marker=MARKERS[number],
            ls=LINES[number],
        )  # fmt: skip
    axes.axhline(resident["tokens/s, warm"], color="0.4", ls=LINES[1], label="no budget")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8)
