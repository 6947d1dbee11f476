"""What a study file says: a claim and its source, the runs that test it, and the rule of the verdict.

A file is `study:` with the fields of `Study`. Members name recipe files, relative to the study's
own, and the fields that they change.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from nano_moe import recipe_file
from nano_moe.config import FieldFault, Recipe, Section
from nano_moe.errors import UserError

Figure = Literal["ce", "bpb", "max_vio", "max_share", "dead_experts", "load_entropy"]
Value = bool | int | float | str | None


class Member(Section):
    """One architecture: a recipe and what it changes."""

    recipe: str = Field(min_length=1, description="a recipe file, relative to the study's")
    fields: dict[str, Value] = Field(default={}, description="overrides, such as model.d_ff: 768")


class Comparison(Section):
    """One sentence of the claim: `better` has the lower figure, by the effect or more."""

    name: str = Field(min_length=1, description="what is held equal")
    better: str = Field(description="the member that the claim favours")
    than: str = Field(description="the member that it is compared with")
    figure: Figure = Field(default="ce", description="of the whole validation split, at the end")
    smallest_effect: float = Field(gt=0, description="the smallest difference worth claiming")


class Study(Section):
    """A question, and the rule that answers it."""

    question: str = Field(min_length=1, description="what a reader wants to know")
    claim: str = Field(min_length=1, description="what was published, in a sentence of ours")
    source: str = Field(min_length=1, description="where")
    seeds: tuple[int, ...] = Field(min_length=1, description="each member runs once per seed")
    members: dict[str, Member] = Field(min_length=1, description="by the name that tables give")
    comparisons: tuple[Comparison, ...] = Field(min_length=1, description="the rule")
    caveats: tuple[str, ...] = Field(default=(), description="what the runs cannot say")

    @field_validator("seeds", "comparisons", "caveats", mode="before")
    @classmethod
    def _a_list_will_do(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise FieldFault("seeds", "a seed is named twice; name each once")
        for number, comparison in enumerate(self.comparisons):
            for side in ("better", "than"):
                name = getattr(comparison, side)
                if name not in self.members:
                    known = ", ".join(self.members)
                    raise FieldFault(
                        f"comparisons.{number}.{side}", f"no member '{name}'; there are {known}"
                    )
            if comparison.better == comparison.than:
                raise FieldFault(
                    f"comparisons.{number}.than", "is the same member; name the other one"
                )
        return self

    @property
    def rule(self) -> str:
        """The sha256 of all that decides runs and verdicts."""
        text = json.dumps(self.model_dump(mode="json", exclude={"caveats"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class StudyFile(Section):
    study: Study


class Planned(NamedTuple):
    """One run of a study."""

    member: str
    seed: int
    recipe: Recipe


def load(path: Path) -> Study:
    """Read a study file; raises UserError in one line."""
    tree = recipe_file.read_tree(path)
    return recipe_file.validate(tree, str(path), StudyFile).study


def plan(path: Path, study: Study, extra: dict[str, Value] | None = None) -> list[Planned]:
    """Every run, members of a seed beside each other; `extra` fields win over the members' own.

    Raises UserError where a member's recipe is missing or at fault.
    """
    planned = []
    for seed in study.seeds:
        for name, member in study.members.items():
            fields = {**member.fields, **(extra or {}), "seed": seed}
            overrides = [f"{key}={json.dumps(value)}" for key, value in fields.items()]
            try:
                recipe = recipe_file.load(path.parent / member.recipe, overrides)
            except UserError as error:
                raise UserError(f"{path}: study.members.{name}: {error}") from error
            planned.append(Planned(name, seed, recipe))
    return planned
