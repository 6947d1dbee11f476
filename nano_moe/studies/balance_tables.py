"""How even each member's load ended, in RESULTS.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from nano_moe.studies.tables import table

BALANCE = ("max_vio", "max_share", "starved_experts", "dead_experts", "load_entropy")
OVER = 2.0  # MaxVio: three times an even share
NOTE = "Routing over the validation split: the worst layer, or experts of all; means over seeds."
DROPPED = "Dropped: of training's last tenth, in the layer that drops most."


def balance_table(content: Mapping[str, Any]) -> str | None:
    """Each member's routing at the end; None where no member has experts.

    And what training dropped, and when a layer first sent an expert thrice its share, where known.
    """
    routed = {
        name: [run for run in content["runs"] if run["member"] == name and "max_vio" in run]
        for name in content["members"]
    }
    drops = any(run["dropped_share"] for runs in routed.values() for run in runs)
    balance = content.get("balance", {})
    rows = []
    for name, runs in routed.items():
        if runs:
            figures = (*BALANCE, "dropped_share") if drops else BALANCE
            means = [statistics.fmean(run[figure] for run in runs) for figure in figures]
            first = [_first_over(balance[name]["max_vio"])] if balance else []
            rows.append((name, *(f"{mean:.2f}" for mean in means), *first))
    if not rows:
        return None
    header = [f"`{name}`" for name in BALANCE] + ["dropped"] * drops
    when = [f"first step with MaxVio over {OVER:g}"] if balance else []
    note = f"{NOTE} {DROPPED}" if drops else NOTE
    return f"{note}\n\n{table(('member', *header, *when), rows)}"


def _first_over(layers: Mapping[str, Any]) -> str:
    """Of the seeds' mean, in training."""
    found = [
        (step, layer)
        for layer, band in layers.items()
        for step, mean in zip(band["at"], band["mean"], strict=True)
        if mean > OVER
    ]
    return "never" if not found else "{} (layer {})".format(*min(found))
