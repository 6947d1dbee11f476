"""One figure per study, from its results alone: the gains, and beside them what they came from."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator

from nano_moe.plotting import COLOURS, HATCHES, LINES, MARKERS, STYLE, png
from nano_moe.studies.units import unit_of

WIDTH, ROW = 9.0, 0.65  # inches


def draw(content: Mapping[str, Any], kind: str) -> bytes:
    """A study's figure as PNG, `kind` being the study's `figure`."""
    panel = PANELS[kind]
    with context(STYLE):
        if kind == "grid":
            figure = Figure(figsize=(WIDTH * 0.6, 3.2), layout="constrained")
            panel(figure.subplots(), content)
        else:
            wide = kind == "balance"
            size = (WIDTH * (1.4 if wide else 1), max(4.0, 1.2 + ROW * len(content["comparisons"])))
            figure = Figure(figsize=size, layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=(1, 2.2 if wide else 1))
            _gains(left, content["comparisons"])
            panel(right, content)
        return png(figure)


def _gains(axes: Axes, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """A row per comparison: its mean and interval, and in grey what is too small to claim.

    In the figure's unit where all share one, else over the smallest effect worth claiming.
    """
    units = {"a factor" if one["relative"] else unit_of(one) for one in comparisons}
    shared = len(units) == 1 and not any(one["relative"] for one in comparisons)
    for row, one in enumerate(reversed(comparisons)):
        effect = one["smallest_effect"]
        effect = math.log1p(effect) if one["relative"] else effect
        scale = 1.0 if shared else effect
        mean = one["mean"] / scale
        low, high = (mean if one[b] is None else one[b] / scale for b in ("low", "high"))
        axes.barh(row, 2 * effect / scale, 0.9, -effect / scale, color="0.9")
        axes.plot([low, high], [row, row], color=COLOURS[0], lw=2)
        axes.plot([mean], [row], "o", color=COLOURS[0])
    labels = [_wrapped(one["says"]) for one in reversed(comparisons)]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.axvline(0, color="0.5", lw=1)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    name = f"gain, {units.pop()}" if shared else "gain ÷ smallest effect worth claiming"
    axes.set_xlabel(f"{name};\nline: 95 % interval; grey: too small to claim")


def _wrapped(text: str, width: int = 34) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "ls": LINES[number % len(LINES)], "lw": 1.5}


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _band(
    axes: Axes, number: int, label: str, at: Sequence[float], band: Mapping[str, Any]
) -> None:
    """A member's mean over its seeds, and the room between the lowest and the highest."""
    skipped = len(band["mean"]) - len(at)
    mean, low, high = (band[name][skipped:] for name in ("mean", "low", "high"))
    axes.plot(at, mean, label=label, **_look(number))
    axes.fill_between(at, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.15, lw=0)


def _curves(axes: Axes, content: Mapping[str, Any]) -> None:
    """Where each run's validation loss ended, and below it how training led over the first member.

    Bands over seeds, of training loss on tokens not seen before, without their first tenth.
    """
    (upper,), (lower,) = _panels(axes, 2, 1, sharex=False, sharey=False)
    members = list(content["curves"])
    for row, member in enumerate(members):
        losses = _of_member(content, member, "ce")
        look: dict[str, Any] = {"color": COLOURS[row % len(COLOURS)], "ls": ""}
        upper.plot(losses, [row] * len(losses), marker="o", mfc="none", ms=5, **look)
        upper.plot([statistics.fmean(losses)], [row], marker="|", ms=16, mew=2, **look)
    upper.set_yticks(range(len(members)), members)
    upper.set_ylim(len(members) - 0.5, -0.5)
    upper.set_xlabel("validation CE, nats per token;\ncircles: seeds, bar: their mean")
    for member, band in content["leads"].items():
        at = [at / 1e6 for at in band["at"]][len(band["at"]) // 10 :]
        _band(lower, members.index(member), member, at, band)
    lower.set_ylabel(f"lead over {members[0]}\nin training, nats")
    lower.axhline(0, color="0.5", lw=1)
    lower.set_xlabel("million tokens")
    _legend(lower)


def _flops(axes: Axes, content: Mapping[str, Any]) -> None:
    """Final validation loss over training FLOPs, a marker per run."""
    teraflops = {
        member: [cost["train_flops"] / 1e12] * len(_of_member(content, member, "ce"))
        for member, cost in content["members"].items()
    }
    _losses_over(axes, content, teraflops, "training TFLOPs")


def _losses_over(
    axes: Axes, content: Mapping[str, Any], at: Mapping[str, Sequence[float]], name: str
) -> None:
    """Final validation losses over something that each run has, by member."""
    for number, member in enumerate(content["members"]):
        axes.plot(
            at[member], _of_member(content, member, "ce"), MARKERS[number % len(MARKERS)],
            label=member, color=COLOURS[number % len(COLOURS)], ms=5, mfc="none",
        )  # fmt: skip
    axes.set_xlabel(name)
    axes.set_ylabel("validation cross-entropy, nats per token")
    _legend(axes)


BALANCE = {
    "max_vio": "MaxVio", "max_share": "largest\nshare", "load_entropy": "load\nentropy",
    "dead_experts": "dead\nexperts",
}  # fmt: skip


def _balance(axes: Axes, content: Mapping[str, Any]) -> None:
    """Every balance figure over steps, a row each, a column per layer."""
    members = content["balance"]
    layers = list(next(iter(members.values()))["max_vio"])
    panels = _panels(axes, len(BALANCE), len(layers))
    for row, (figure, name) in enumerate(BALANCE.items()):
        for column, layer in enumerate(layers):
            panel = panels[row][column]
            for number, (member, figures) in enumerate(members.items()):
                band = figures[figure][layer]
                _band(panel, number, member, band["at"], band)
            if row == 0:
                panel.set_title(f"layer {layer}", fontsize=9)
        panels[row][0].set_ylabel(name)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure_of = panels[0][0].get_figure()
    assert figure_of is not None
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure_of.legend(handles, labels, loc="outside upper right", ncols=len(labels))


def _panels(
    axes: Axes, rows: int, columns: int, *, sharex: bool = True, sharey: bool = True
) -> list[list[Axes]]:
    """Small axes in place of one, scales shared along columns and rows where not said."""
    figure, place = axes.get_figure(), axes.get_subplotspec()
    assert figure is not None and place is not None
    axes.remove()
    grid = place.subgridspec(rows, columns)
    panels = grid.subplots(sharex=sharex, sharey="row" if sharey else False, squeeze=False)
    return [list(row) for row in panels]


def _memory(axes: Axes, content: Mapping[str, Any]) -> None:
    """What measured members hold and take, over the first of them."""
    figures = {
        "memory_gb": "memory,\ntraining",
        "train_ms_per_token": "time,\ntraining",
        "decode_ms_per_token": "time,\ndecoding",
    }
    _over_first(axes, content, figures)


def _offload(axes: Axes, content: Mapping[str, Any]) -> None:
    """What decoding holds and takes by budget, over that with all experts in memory."""
    figures = {
        "memory_gb": "memory",
        "decode_ms_per_token": "time,\nfile cached",
        "cold_ms_per_token": "time,\nfrom disk",
    }
    _over_first(axes, content, figures)


def _exchange(axes: Axes, content: Mapping[str, Any]) -> None:
    """What members on several ranks exchange, and the time that takes, over the first of them."""
    figures = {
        "exchange_bytes": "bytes\nexchanged",
        "exchange_ms": "time in the\nexchange",
        "step_ms": "time of\na step",
    }
    _over_first(axes, content, figures)


def _over_first(axes: Axes, content: Mapping[str, Any], figures: Mapping[str, str]) -> None:
    """Bars of each figure, for the members that have them all, over the first of these."""
    members = [
        name
        for name in content["members"]
        if all(_of_member(content, name, figure) for figure in figures)
    ]
    for number, member in enumerate(members):
        medians = [statistics.median(_of_member(content, member, figure)) for figure in figures]
        base = [statistics.median(_of_member(content, members[0], figure)) for figure in figures]
        at = [place + (number - (len(members) - 1) / 2) * 0.26 for place in range(len(figures))]
        axes.bar(
            at, [m / b for m, b in zip(medians, base, strict=True)], 0.24, label=member,
            color=COLOURS[number % len(COLOURS)], edgecolor="black", hatch=HATCHES[number % 3],
        )  # fmt: skip
    axes.set_xticks(range(len(figures)), list(figures.values()))
    axes.set_ylabel(f"relative to: {members[0]}")
    _legend(axes)


def _of_member(content: Mapping[str, Any], member: str, figure: str) -> list[float]:
    return [run[figure] for run in content["runs"] if run["member"] == member and figure in run]


def _grid(axes: Axes, content: Mapping[str, Any]) -> None:
    """Final validation loss over the values, a line per member."""
    values = [float(value) for value in next(iter(content["grid"]["members"].values()))["ce"]]
    for number, (member, row) in enumerate(content["grid"]["members"].items()):
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(
            values, list(row["ce"].values()), marker=marker, ms=4, label=member, **_look(number)
        )
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(content["grid"]["field"])
    axes.set_ylabel("validation cross-entropy, nats per token")
    _legend(axes)


def _trend(axes: Axes, content: Mapping[str, Any]) -> None:
    """A panel per trend: leads by line, or of a single line the losses and the fitted slope."""
    trends = [one for one in content["comparisons"] if "points" in one]
    panels = _panels(axes, len(trends), 1, sharex=False, sharey=False)
    for (panel,), trend in zip(panels, trends, strict=True):
        if len(trend["lines"]) > 1:
            _leads(panel, trend)
        else:
            _slope(panel, content, trend)
        panel.set_xscale("log", base=2)
        xs = sorted({float(x) for line in panel.get_lines() for x in np.asarray(line.get_xdata())})
        panel.set_xticks(xs, [f"{x:g}" for x in xs])
        panel.minorticks_off()
        panel.set_xlabel(trend["per"].removeprefix("doubling of "))
        panel.legend()


def _leads(axes: Axes, trend: Mapping[str, Any]) -> None:
    for point in trend["points"]:
        number = point["line"]
        label = _line_name(*next(iter(trend["lines"][number].items())))
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(point["x"], point["gain"], label=label, ms=4, marker=marker, **_look(number))
    axes.set_ylabel("lead, nats per token")


def _slope(axes: Axes, content: Mapping[str, Any], trend: Mapping[str, Any]) -> None:
    """The figure over a trend's numbers and its slope; others stand at their number of experts.

    Means are joined of the members that ran with all seeds.
    """
    at = {member: float(x) for x, member in trend["lines"][0].items()}
    counts = {name: _n_experts(member["recipe"]) for name, member in content["members"].items()}
    if all(counts[member] == x for member, x in at.items()):
        at |= counts
    runs = {
        name: _of_member(content, name, trend["figure"]) for name in sorted(at, key=lambda n: at[n])
    }
    runs = {name: values for name, values in runs.items() if values}
    most = max(map(len, runs.values()))
    means = {at[name]: statistics.fmean(values) for name, values in runs.items()}
    joined = [at[name] for name, values in runs.items() if len(values) == most]
    axes.plot(joined, [means[x] for x in joined], label=f"mean of {most} seeds", **_look(0))
    for name, values in runs.items():
        axes.plot([at[name]] * len(values), values, "o", ms=5, mfc="none", color=COLOURS[0])
    xs = trend["points"][0]["x"]
    middle = statistics.fmean(map(math.log2, xs)), statistics.fmean(means[x] for x in xs)
    fit = [middle[1] - trend["mean"] * (math.log2(x) - middle[0]) for x in (xs[0], xs[-1])]
    axes.plot([xs[0], xs[-1]], fit, label=f"fit: {-trend['mean']:+.3f} a doubling", **_look(1))
    named = {"ce": "validation CE, nats per token"}
    axes.set_ylabel(named.get(trend["figure"], trend["figure"]))


def _n_experts(recipe: Mapping[str, Any]) -> float:
    moe = recipe["model"]["moe"]
    return float(moe["n_experts"]) if moe else 1.0


def _line_name(x: str, members: str | Sequence[str]) -> str:
    """What a line's better members are called, without the number that varies along it."""
    name = members if isinstance(members, str) else members[0]
    return re.sub(rf",? {re.escape(x)}\b", "", name)


def _price(axes: Axes, content: Mapping[str, Any]) -> None:
    """Final validation loss over MaxVio, a marker per run.

    Means are joined where members are named by the number that they vary.
    """
    members = list(content["members"])
    at = {member: _of_member(content, member, "max_vio") for member in members}
    if all(re.fullmatch(r"[\d.]+", member) for member in members):
        losses = [_of_member(content, member, "ce") for member in members]
        xs, ys = ([statistics.fmean(one) for one in each] for each in (at.values(), losses))
        axes.plot(xs, ys, color="0.6", lw=1, zorder=0, label="means")
    _losses_over(axes, content, at, "MaxVio of the worst layer")


def _specialization(axes: Axes, content: Mapping[str, Any]) -> None:
    """What the expert tells by layer, and how early in training its tokens' choices are final."""
    (upper,), (lower,) = _panels(axes, 2, 1, sharex=False)
    for number, (member, runs) in enumerate(content["looks"].items()):
        for name, style in (("domain", "-"), ("class", "--")):
            layers = [
                [layer[name] - layer[f"{name}_shuffled"] for layer in run["layers"]]
                for run in runs.values()
            ]
            means = [statistics.fmean(column) for column in zip(*layers, strict=True)]
            upper.plot(
                range(len(means)), means, ls=style, marker=MARKERS[number % len(MARKERS)], ms=4,
                color=COLOURS[number % len(COLOURS)], label=f"{member}: {name}",
            )  # fmt: skip
        saturations = [run["saturation"] for run in runs.values()]
        shares = [layer for one in saturations for layer in one["layers"]]
        columns = list(zip(*shares, strict=True))
        _band(
            lower, number, member, saturations[0]["steps"],
            {"mean": list(map(statistics.fmean, columns)), "low": list(map(min, columns)),
             "high": list(map(max, columns))},
        )  # fmt: skip
    upper.set_xticks(range(len(next(iter(runs.values()))["layers"])))
    upper.set_xlabel("layer")
    upper.set_ylabel("bits about the expert,\nabove shuffled labels")
    lower.set_xlabel("step; range over layers and seeds")
    lower.set_ylabel("choices that are final")
    _legend(upper)
    _legend(lower)


def _leak(axes: Axes, content: Mapping[str, Any]) -> None:
    """The losses of each member that was looked at, mean and range of its seeds."""
    names = ("ce_whole", "ce_prefix", "ce_own_future", "ce_other_future")
    members = list(content["looks"])
    for number, member in enumerate(members):
        at = [place + (number - (len(members) - 1) / 2) * 0.2 for place in range(len(names))]
        for x, name in zip(at, names, strict=True):
            values = _of_member(content, member, name)
            axes.plot([x, x], [min(values), max(values)], **_look(number))
        means = [statistics.fmean(_of_member(content, member, name)) for name in names]
        axes.plot(
            at, means, MARKERS[number % len(MARKERS)], label=member,
            color=COLOURS[number % len(COLOURS)],
        )  # fmt: skip
    axes.set_xticks(
        range(len(names)),
        [
            "all in\nsight",
            "token by\ntoken, of\na tenth",
            "first half,\nown end",
            "first half,\nother end",
        ],
    )
    axes.set_ylabel("cross-entropy, nats per token")
    _legend(axes)


PANELS: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "curves": _curves,
    "flops": _flops,
    "balance": _balance,
    "memory": _memory,
    "grid": _grid,
    "trend": _trend,
    "price": _price,
    "specialization": _specialization,
    "leak": _leak,
    "offload": _offload,
    "exchange": _exchange,
}
