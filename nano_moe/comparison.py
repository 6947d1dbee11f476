"""Runs side by side: validation figures at equal tokens, equal training FLOPs, equal seconds.

Reads run folders alone. A figure at a budget between two validations is interpolated linearly;
a run's schedule ends at its own last step, so figures inside a schedule are pessimistic.
"""

from __future__ import annotations

import csv
from typing import Any, NamedTuple

from nano_moe.config import SEES_THE_FUTURE
from nano_moe.errors import UserError
from nano_moe.runs import Run

BUDGETS = ("tokens", "flops", "seconds")


class Curve(NamedTuple):
    """A run's validations in order, by what had been spent."""

    name: str
    spent: dict[str, list[float]]  # per budget
    ce: list[float]
    bpb: list[float]


def read_curve(run: Run) -> Curve:
    """Validation rows of metrics.csv; raises UserError where there are none."""
    rows = []
    try:
        with open(run.metrics_file, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/ce")]
        spent = {budget: [float(row[budget]) for row in rows] for budget in BUDGETS}
        ce, bpb = [float(row["val/ce"]) for row in rows], [float(row["val/bpb"]) for row in rows]
    except FileNotFoundError:
        raise UserError(f"{run.metrics_file}: missing; this run has not trained yet") from None
    except (KeyError, ValueError, TypeError, csv.Error):
        raise UserError(f"{run.metrics_file}: not a metrics file of this kit") from None
    if not rows:
        if run.recipe_file.is_file() and not run.recipe().model.is_causal:
            raise UserError(f"{run.path}: {SEES_THE_FUTURE}")
        raise UserError(f"{run.metrics_file}: no validation yet; let the run train further")
    return Curve(run.name, spent, ce, bpb)


def compare(runs: list[Run]) -> dict[str, Any]:
    """Parameters of each run and its validation CE and bits per byte at each common budget."""
    curves = [read_curve(run) for run in runs]
    common = {b: min(curve.spent[b][-1] for curve in curves) for b in BUDGETS}
    rows = []
    for run, curve in zip(runs, curves, strict=True):
        manifest = run.manifest()
        row: dict[str, Any] = {
            "run": run.name,
            "seed": manifest.get("seed"),
            "corpus": str(manifest.get("corpus", {}).get("sha256", ""))[:12],
            "parameters": manifest.get("parameters", {}),
            "init_from": manifest.get("init_from"),
            "final": {"ce": curve.ce[-1], "bpb": curve.bpb[-1]},
        }
        for budget in BUDGETS:
            row[f"at_equal_{budget}"] = {
                "ce": interpolate(common[budget], curve.spent[budget], curve.ce),
                "bpb": interpolate(common[budget], curve.spent[budget], curve.bpb),
            }
        rows.append(row)
    return {"budgets": common, "runs": rows}


def interpolate(at: float, xs: list[float], ys: list[float]) -> float | None:
    """Linear between points of increasing `xs`; None before the first."""
    if at < xs[0]:
        return None
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return ys[-1]
