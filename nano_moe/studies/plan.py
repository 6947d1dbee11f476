"""From a study file to its runs, and whether they hold equal what the rule says is equal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nano_moe import recipe_file
from nano_moe.accounting import count, params_by_kind, weight_groups
from nano_moe.config import SEES_THE_FUTURE, Recipe
from nano_moe.errors import UserError
from nano_moe.runs import first_difference
from nano_moe.studies.schema import Comparison, Equal, Member, Study, Value

FLOPS_WITHIN = 0.003  # what the routers of a few experts cost
TIME_WITHIN = 0.02
# What members share unless a study is about it; None: every field.
SURROUNDINGS: dict[str, set[str] | None] = {
    "model": {"vocab_size", "context", "init_std"},
    "data": None,
    "optim": None,
    "trainer": {"batch_size", "accumulate", "precision"},
}
ELSEWHERE = {"data.files", "data.cache", "optim.lr", "optim.expert_lr"}
INIT_FROM = "model.moe.init_from"
FFN_KINDS = ("ffn", "experts", "shared_experts")


class Planned(NamedTuple):
    """One run of a study; where it starts from another, `recipe` names that one's member."""

    member: str
    seed: int
    recipe: Recipe
    stem: str  # of its recipe file
    measure: bool
    look: str | None = None
    expert_budget: str | None = None
    expert_ranks: int | None = None
    source: tuple[str, int] | None = None  # member and seed of the run that it starts from


def plan(path: Path, study: Study, extra: Mapping[str, Value] | None = None) -> list[Planned]:
    """Every run, members of a seed beside each other; `extra` fields win over the members' own.

    Raises UserError where a member's recipe is missing or at fault, or sees the future: its loss is
    none (trap T13), and only the leak is looked at. A member of a grid is one run per value, named
    `member @ value`.
    """
    return [
        _planned(path, study, name, member, seed, {**fields, **(extra or {})})
        for seed in study.seeds
        for name, member, fields in _expanded(study)
        if seed in (member.seeds or study.seeds)
    ]


def _expanded(study: Study) -> list[tuple[str, Member, dict[str, Value]]]:
    if study.grid is None:
        return [
            (name, member, {**study.fields, **member.fields})
            for name, member in study.members.items()
        ]
    return [
        (at(name, value), member, {**study.fields, **member.fields, study.grid.field: value})
        for name, member in study.members.items()
        for value in study.grid.values
    ]


def at(member: str, value: float) -> str:
    """The name of a grid's run."""
    return f"{member} @ {value:g}"


def _planned(
    path: Path, study: Study, name: str, member: Member, seed: int, fields: Mapping[str, Value]
) -> Planned:
    source = None
    if member.start_from is not None:
        next_seed = study.seeds[(study.seeds.index(seed) + 1) % len(study.seeds)]
        source = (member.start_from, next_seed)  # its own would see its batches a second time
        fields = {**fields, INIT_FROM: member.start_from}
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**fields, "seed": seed}.items()]
    where = f"{path}: study.members.{name}"
    file = Path(os.path.normpath(path.parent / member.recipe))
    try:
        recipe = recipe_file.load(file, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not recipe.model.is_causal and member.look != "leak":
        raise UserError(f"{where}: {SEES_THE_FUTURE}; leave it out")
    if recipe.model.moe is None and member.look in ("specialization", "offload", "exchange"):
        raise UserError(f"{where}.look: a dense member has no experts to look at; drop it")
    if recipe.model.moe is None and member.expert_budget is not None:
        raise UserError(f"{where}.expert_budget: a dense member has no experts; drop it")
    ranks = member.expert_ranks
    if ranks is not None and (recipe.model.moe is None or recipe.model.moe.n_experts % ranks):
        raise UserError(
            f"{where}.expert_ranks: {ranks} must divide the experts; change one of them"
        )
    return Planned(
        name, seed, recipe, file.stem, member.measure, member.look, member.expert_budget, ranks,
        source,
    )  # fmt: skip


def check_fair(path: Path, study: Study, planned: list[Planned]) -> None:
    """Raises UserError where members are not equal in what their comparison says (trap T19)."""
    recipes = {one.member: one.recipe for one in planned}
    compared = [*study.comparisons, *(pair for trend in study.trends for pair in trend.pairs)]
    for number, comparison in enumerate(compared):
        one, other = (_surroundings(recipes[side], study) for side in _sides(comparison))
        field = first_difference(one, other)
        if field is not None:
            raise UserError(
                f"{path}: study.comparisons.{number}: {comparison.better} and {comparison.than} "
                f"differ in {field}; make it equal, or name it under study.varies"
            )
        outside = {side: outside_params(recipes[side]) for side in _sides(comparison)}
        if len(set(outside.values())) > 1:
            raise UserError(
                f"{path}: study.comparisons.{number}: embeddings, attention and norms are not "
                f"equal ({', '.join(f'{side} {n:,}' for side, n in outside.items())})"
            )
        for what in comparison.equal:
            better, than = (_amount(what, study, side, recipes) for side in _sides(comparison))
            within = {"flops": FLOPS_WITHIN, "time": TIME_WITHIN}.get(what, 0.0)
            if not math.isclose(better, than, rel_tol=within, abs_tol=0):
                raise UserError(
                    f"{path}: study.comparisons.{number}.equal: {what}: {comparison.better} has "
                    f"{better:,.0f} and {comparison.than} {than:,.0f}; make them equal, or do "
                    "not claim it"
                )


def _surroundings(recipe: Recipe, study: Study) -> dict[str, Any]:
    """Text, batches, start, rates but for those tuned, and precision, less what is to vary."""
    fields = recipe.model_dump(mode="json")
    kept = {
        f"{section}.{name}": value
        for section, names in SURROUNDINGS.items()
        for name, value in fields[section].items()
        if (names is None or name in names) and f"{section}.{name}" not in ELSEWHERE
    }
    return {name: value for name, value in kept.items() if name not in study.varies}


def _sides(comparison: Comparison) -> tuple[str, str]:
    return comparison.better, comparison.than


def _amount(what: Equal, study: Study, member: str, recipes: Mapping[str, Recipe]) -> float:
    recipe = recipes[member]
    source = study.members[member].start_from
    if what == "tokens":
        return recipe.trainer.steps * recipe.tokens_per_step
    if what == "flops":
        return train_flops(recipe) + (train_flops(recipes[source]) if source else 0)
    if what == "time":
        if member not in study.step_times:
            raise UserError(f"study.step_times: has none of {member}; measure it with bench step")
        return recipe.trainer.steps * study.step_times[member]
    if what == "active":
        return ffn_params(recipe).active
    if what == "total":
        return ffn_params(recipe).total
    return 0  # seeds are equal by plan


def train_flops(recipe: Recipe) -> int:
    """FLOPs of a whole training."""
    tokens = recipe.trainer.steps * recipe.tokens_per_step
    return tokens * count(recipe).train_flops_per_token


def outside_params(recipe: Recipe) -> int:
    """Weights outside of FFN, experts and routers."""
    counted = count(recipe)
    return counted.total_params - counted.router_params - ffn_params(recipe).total


class FFNParams(NamedTuple):
    """Weights of FFN or experts, shared ones included, routers not."""

    total: int
    active: int


def ffn_params(recipe: Recipe) -> FFNParams:
    """FFN and expert weights of all layers, stored and met by one token."""
    groups = list(weight_groups(recipe.model))
    stored, met = (params_by_kind(groups, active=active) for active in (False, True))
    return FFNParams(*(sum(kinds.get(kind, 0) for kind in FFN_KINDS) for kinds in (stored, met)))
