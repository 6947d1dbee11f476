"""How a run's load spread as it trained, from the events that it logged."""

from __future__ import annotations

import math

from nano_moe.errors import UserError
from nano_moe.evaluation import STARVED
from nano_moe.explorer.contract import Balance, Load
from nano_moe.runs import Run

POINTS = 400  # steps that the page is given at most


def balance(run: Run) -> Balance:
    """The document of a sparse run; raises UserError where it logged no loads."""
    series = _loads(run)
    if not series:
        raise UserError(
            f"{run.path}: holds no TensorBoard events with expert loads; copy the run's "
            "events.out.tfevents.* files beside its recipe.yaml"
        )
    whole = set.intersection(*(set(points) for points in series.values()))
    steps = _thinned(sorted(whole))
    layers = sorted({layer for layer, _ in series})
    return {
        "steps": steps,
        "tokens_per_step": run.recipe().tokens_per_step,
        "layers": [_layer(layer, series, steps) for layer in layers],
    }


def _loads(run: Run) -> dict[tuple[int, int], dict[int, float]]:
    """(layer, expert) -> step -> share of assignments."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    series = {}
    for tag in events.Tags()["scalars"]:
        room, _, rest = tag.partition("/")
        layer, _, expert = rest.partition("/")
        if room == "moe_load":
            key = int(layer.removeprefix("layer")), int(expert)
            series[key] = {event.step: event.value for event in events.Scalars(tag)}
    return series


def _thinned(steps: list[int]) -> list[int]:
    """Evenly spaced steps, the first and the last among them."""
    every = math.ceil(len(steps) / POINTS) or 1
    return sorted({*steps[::every], *steps[-1:]})


def _layer(layer: int, series: dict[tuple[int, int], dict[int, float]], steps: list[int]) -> Load:
    experts = sorted(expert for of, expert in series if of == layer)
    load = [[series[layer, expert][step] for expert in experts] for step in steps]
    even = 1 / len(experts)
    return {
        "layer": layer,
        "load": [[round(share, 5) for share in row] for row in load],
        "max_vio": [round(max(row) / even - 1, 4) for row in load],
        "dead": [sum(share == 0 for share in row) for row in load],
        "starved": [sum(share < STARVED * even for share in row) for row in load],
    }
