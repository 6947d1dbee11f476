"""The gpu tier: a study's runs enlarged as recipes/gpu/base.yaml enlarges recipes/base.yaml.

Numbers of a member that differ from the small anchor's keep their ratio to it, so that a dense FFN
of twice the anchor's width stays one; what equals the small anchor's becomes the large one's.
Members that are measured untrained stay as they are, and are measured on the CPU in this tier, too.

NOT RUN BY US: memory and time are estimates, and so are the rates.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nano_moe import recipe_file
from nano_moe.accounting import FLOAT32_BYTES, count
from nano_moe.bench.recipes import FOLDER
from nano_moe.config import Recipe
from nano_moe.footprint import peak
from nano_moe.studies.plan import Planned, at, plan, train_flops
from nano_moe.studies.schema import Study, Value

GPU = "gpu"
PEAK = 312e12  # FLOP/s: an A100 in bf16 with dense matrices, by NVIDIA's data sheet
SHARE = 0.35  # of that peak, a usual one for models this small; a guess for ours
ASKED = {"precision"}  # what a member says of it is meant
FLOPS_WITHIN = 0.01  # attention's share is another one, so steps that were equal in FLOPs are not
CAVEAT = (
    "The gpu tier: rates are those of the small anchor's grid in the ratio of the two anchors, and "
    "were not tuned at this size; FLOPs are equal within 1 %. Members that are measured untrained "
    "stay of their size, and what is measured of them, and the memory of all, is the CPU's."
)


class Cost(NamedTuple):
    """What a run would take; memory and time are estimates."""

    total_params: int
    active_params: int
    tokens: int
    flops: int
    memory_bytes: int
    seconds: float


def larger_study(study: Study) -> Study:
    """The study of the gpu tier: without what equal time says, which was measured on a CPU."""
    kept = tuple(one for one in study.comparisons if "time" not in one.equal)
    dropped = [one for one in study.comparisons if "time" in one.equal]
    named = {side for one in kept for side in (one.better, one.than)}
    named |= {side for pair in _pairs(study) for side in pair}
    gone = {side for one in dropped for side in (one.better, one.than)} - named
    changes: dict[str, Any] = {
        "comparisons": kept,
        "members": {name: one for name, one in study.members.items() if name not in gone},
        "step_times": {},
        "caveats": (*study.caveats, CAVEAT),
    }
    if study.grid is not None:
        values = tuple(_of_grid(study, value) for value in study.grid.values)
        changes["grid"] = study.grid.model_copy(update={"values": values})
    return study.model_copy(update=changes)


def larger_plan(path: Path, study: Study, extra: Mapping[str, Value]) -> list[Planned]:
    """Every run of the gpu tier of a study, as `plan` gives those of its full one."""
    members = larger_study(study).members
    names = {
        at(name, value): at(name, _of_grid(study, value))
        for name in members
        for value in (study.grid.values if study.grid else ())
    }
    small = study.model_copy(update={"members": members})
    return [
        one
        if one.measure
        else one._replace(recipe=larger(one.recipe), member=names.get(one.member, one.member))
        for one in plan(path, small, extra)
    ]


def larger(recipe: Recipe) -> Recipe:
    """A recipe as far from the large anchor as it is from the small one."""
    mine, small, large = (one.model_dump(mode="json") for one in (recipe, *_anchors()))
    for section in ("model", "optim", "trainer"):
        mine[section] = {
            name: value if name in ASKED else _larger(value, small[section][name], other)
            for (name, value), other in zip(
                mine[section].items(), large[section].values(), strict=True
            )
        }
    if mine["data"] == small["data"]:
        mine["data"] = large["data"]
    moe = mine["model"]["moe"]
    if moe is not None and moe["d_expert"] is not None:
        moe["d_expert"] = _larger(moe["d_expert"], small["model"]["d_ff"], large["model"]["d_ff"])
    return Recipe.model_validate(mine)


def cost(recipe: Recipe, flops_per_second: float = PEAK * SHARE) -> Cost:
    """What a run would take on a GPU of that speed, in bf16.

    Memory is the CPU path's peak and, on top, wide logits, their logarithms and their gradient.
    """
    counted, trainer = count(recipe), recipe.trainer
    flops = train_flops(recipe)
    logits = FLOAT32_BYTES * trainer.batch_size * recipe.model.context * recipe.model.vocab_size
    return Cost(
        total_params=counted.total_params,
        active_params=counted.active_params,
        tokens=trainer.steps * recipe.tokens_per_step,
        flops=flops,
        memory_bytes=peak(recipe, "bf16").bytes + 3 * logits,
        seconds=flops / flops_per_second,
    )


class Anchors(NamedTuple):
    small: Recipe
    large: Recipe


@functools.cache
def _anchors() -> Anchors:
    return Anchors(*(recipe_file.load(FOLDER / name) for name in ("base.yaml", "gpu/base.yaml")))


def _larger(value: Any, small: Any, large: Any) -> Any:
    if value == small:
        return large
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, small))
    if not numbers or not small:
        return value
    ratio = value * large / small
    return max(1, round(ratio)) if isinstance(value, int) else float(f"{ratio:.6g}")


def _of_grid(study: Study, value: float) -> float:
    assert study.grid is not None
    section, name = study.grid.field.split(".")
    small, large = (getattr(getattr(one, section), name) for one in _anchors())
    return _larger(value, small, large)


def _pairs(study: Study) -> list[tuple[str, ...]]:
    """Members that something other than a comparison needs."""
    pairs = [(pair.better, pair.than) for trend in study.trends for pair in trend.pairs]
    points = [point for trend in study.trends for line in trend.lines for point in line.values()]
    singles = [(point,) for point in points if isinstance(point, str)]
    recovered = study.recovered.model_dump().values() if study.recovered else ()
    sources = [one.start_from for one in study.members.values() if one.start_from]
    return [*pairs, *singles, tuple(recovered), tuple(sources), tuple(study.timed)]
