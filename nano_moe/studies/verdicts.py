"""The rule at work: gains by seed, slopes and shares, each with its interval and verdict."""

from __future__ import annotations

import math
import statistics
from typing import Any

from nano_moe.studies.schema import Comparison, Recovered, Trend
from nano_moe.studies.statistics import Interval, interval, ratio_interval, verdict

WITHHELD = "withheld: a smoke test"


def compare(
    comparison: Comparison, by_member: dict[str, dict[int, dict[str, Any]]], smoke: bool
) -> dict[str, Any]:
    """A comparison's gain per seed, its interval, and the verdict by the study's rule."""
    gains = gains_of(comparison, by_member)
    effect = comparison.smallest_effect
    effect = math.log1p(effect) if comparison.relative else effect
    return {
        **comparison.model_dump(mode="json"),
        "gains": {str(seed): gain for seed, gain in gains.items()},
        **_judged(list(gains.values()), effect, smoke),
    }


def gains_of(
    comparison: Comparison, by_member: dict[str, dict[int, dict[str, Any]]]
) -> dict[int, float]:
    """By seed that both members have; positive on the side of the claim."""
    better, than = (by_member[side] for side in (comparison.better, comparison.than))
    figure, sign = comparison.figure, -1 if comparison.higher else 1
    gains = {}
    for seed in [seed for seed in better if seed in than]:
        here, there = better[seed][figure], than[seed][comparison.than_figure or figure]
        gains[seed] = sign * (math.log(there / here) if comparison.relative else there - here)
    return gains


def trend(
    of: Trend, by_member: dict[str, dict[int, dict[str, Any]]], smoke: bool
) -> dict[str, Any]:
    """A trend's slope of every line and seed, in gain per doubling, read as a comparison is."""
    slopes, points = {}, []
    for number, line in enumerate(of.lines):
        by_seed = [_heights(of, point, by_member) for point in line.values()]
        for seed in [s for s in by_seed[0] if all(s in heights for heights in by_seed)]:
            heights = [each[seed] for each in by_seed]
            xs = [float(x) for x in line]
            slope = statistics.linear_regression([math.log2(x) for x in xs], heights).slope
            slopes[f"line {number + 1}, seed {seed}"] = slope
            points.append({"line": number, "seed": seed, "x": xs, "gain": heights})
    return {
        **of.model_dump(mode="json"),
        "relative": False,
        "gains": slopes,
        "points": points,
        **_judged(list(slopes.values()), of.smallest_effect, smoke),
    }


def _heights(
    of: Trend, point: str | tuple[str, ...], by_member: dict[str, dict[int, dict[str, Any]]]
) -> dict[int, float]:
    """By seed: a pair's gap, or how far a member's figure lies under zero."""
    if isinstance(point, str):
        return {seed: -run[of.figure] for seed, run in by_member[point].items()}
    return gains_of(of.pair(*point), by_member)


def _judged(gains: list[float], effect: float, smoke: bool) -> dict[str, Any]:
    found = interval(gains)
    return {**as_json(found), "verdict": WITHHELD if smoke else verdict(found, effect)}


def as_json(of: Interval) -> dict[str, float | int | None]:
    """Bounds that a single difference does not have are null."""
    bounded = of.n > 1
    return {
        "mean": of.mean,
        "low": of.low if bounded else None,
        "high": of.high if bounded else None,
        "n": of.n,
        "detectable": of.detectable if bounded else None,
    }


def recovered(
    names: Recovered,
    by_member: dict[str, dict[int, dict[str, Any]]],
    members: dict[str, dict[str, Any]],
) -> dict[str, Any] | None:
    """What share the part's mean gain is of the whole's, and its share of the FLOPs.

    None where the whole's own gain is not told from zero.
    """
    sides = (by_member[name] for name in (names.base, names.part, names.whole))
    base, part, whole = ({seed: run["ce"] for seed, run in side.items()} for side in sides)
    over, under = ([base[seed] - side[seed] for seed in base] for side in (part, whole))
    if interval(under).low <= 0:
        return None
    share = as_json(ratio_interval(over, under))
    flops = {name: members[name]["train_flops"] for name in (names.part, names.whole)}
    return {
        **names.model_dump(),
        "gain": statistics.fmean(over),
        "of": statistics.fmean(under),
        **{name: share[name] for name in ("mean", "low", "high", "n")},
        "flops_share": flops[names.part] / flops[names.whole],
    }
