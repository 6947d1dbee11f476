"""What a study file says: a claim, its source, the runs that test it, and the verdict's rule.

A file is `study:` with the fields of `Study`. Members name recipe files, relative to the study's
own, and the fields that they change.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from nano_moe import recipe_file
from nano_moe.config import FieldFault, Section
from nano_moe.errors import UserError

TRAINED = (
    "ce", "bpb", "max_vio", "max_share", "dead_experts", "starved_experts", "load_entropy",
)  # fmt: skip
MEASURED = ("memory_gb", "train_ms_per_token", "decode_ms_per_token")
Figure = Literal[
    "ce", "bpb", "max_vio", "max_share", "dead_experts", "starved_experts", "load_entropy",
    "memory_gb", "train_ms_per_token", "decode_ms_per_token",
]  # fmt: skip
Equal = Literal["seeds", "tokens", "flops", "time", "active", "total"]
Item = TypeVar("Item")


def _single(given: Any) -> Any:
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError("must be a finite number")
    if not isinstance(given, bool | int | float | str | None):
        raise ValueError("must be a single value; give each field of a block its own line")
    return given


Value = Annotated[bool | int | float | str | None, BeforeValidator(_single)]


def _a_list_will_do(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


Listed = Annotated[tuple[Item, ...], BeforeValidator(_a_list_will_do)]  # YAML knows no tuples


class Member(Section):
    """One architecture: a recipe and what it changes."""

    recipe: str = Field(min_length=1, description="a recipe file, relative to the study's")
    fields: dict[str, Value] = Field(default={}, description="overrides, such as model.d_ff: 768")
    tuned_as: str | None = Field(
        default=None, description="the class of the learning-rate grid whose best rate it takes"
    )
    measure: bool = Field(
        default=False, description="time and weigh untrained weights of this shape; do not train"
    )


class Comparison(Section):
    """One sentence of the claim: `better` has the lower figure, by the effect or more."""

    says: str = Field(min_length=1, description="the claim, such as: top-2 ends below dense")
    better: str = Field(description="the member that the claim favours")
    than: str = Field(description="the member that it is compared with")
    equal: Listed[Equal] = Field(
        default=("seeds",), description="what is held equal, and checked before the runs"
    )
    figure: Figure = Field(default="ce", description="lower is better; routing: the worst layer")
    relative: bool = Field(
        default=False, description="compare logarithms: factors, not differences"
    )
    smallest_effect: float = Field(
        gt=0, description="the smallest difference worth claiming; relative: a factor minus 1"
    )


class Recovered(Section):
    """How much of the gain from `base` to `whole` the member `part` has."""

    base: str
    part: str
    whole: str


class Grid(Section):
    """Every member once per value: what the best value of a field is."""

    field: str = Field(min_length=1, description="such as optim.lr")
    values: Listed[float] = Field(min_length=4, description="in rising order")


class Study(Section):
    """A question, and the rule that answers it."""

    order: int = Field(ge=0, description="place in the report")
    title: str = Field(min_length=1, max_length=60, description="a heading")
    question: str = Field(min_length=1, description="what a reader wants to know")
    claim: str = Field(min_length=1, description="what was published, in a sentence of ours")
    source: str = Field(min_length=1, description="where")
    seeds: Listed[int] = Field(min_length=1, description="each member runs once per seed")
    fields: dict[str, Value] = Field(default={}, description="overrides that all members share")
    members: dict[str, Member] = Field(min_length=1, description="by the name that tables give")
    comparisons: Listed[Comparison] = Field(default=(), description="the rule")
    grid: Grid | None = Field(default=None, description="instead of comparisons")
    step_times: dict[str, float] = Field(
        default={}, description="seconds a step over those of the first, for `equal: [time]`"
    )
    recovered: Recovered | None = Field(default=None, description="a share of a gain, and its cost")
    figure: Literal["curves", "flops", "balance", "memory", "grid"] = Field(
        default="curves", description="what is drawn beside the comparisons"
    )
    caveats: Listed[str] = Field(default=(), description="what the runs cannot say")

    @model_validator(mode="after")
    def _check(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise FieldFault("seeds", "a seed is named twice; name each once")
        if (self.grid is None) == (not self.comparisons):
            raise FieldFault("comparisons", "give comparisons, or a grid, and not both")
        for number, comparison in enumerate(self.comparisons):
            self._check_comparison(f"comparisons.{number}", comparison)
        for side, name in (self.recovered.model_dump() if self.recovered else {}).items():
            self._check_member(f"recovered.{side}", name)
        for name in self.step_times:
            self._check_member(f"step_times.{name}", name)
        return self

    def _check_comparison(self, where: str, comparison: Comparison) -> None:
        for side in ("better", "than"):
            name = getattr(comparison, side)
            self._check_member(f"{where}.{side}", name)
            if self.members[name].measure != (comparison.figure in MEASURED):
                known = ", ".join(MEASURED if self.members[name].measure else TRAINED)
                raise FieldFault(
                    f"{where}.figure", f"'{name}' has no {comparison.figure}; it has {known}"
                )
        if comparison.better == comparison.than:
            raise FieldFault(f"{where}.than", "is the same member; name the other one")

    def _check_member(self, where: str, name: str) -> None:
        if name not in self.members:
            raise FieldFault(where, f"no member '{name}'; there are {', '.join(self.members)}")

    @property
    def rule(self) -> str:
        """The sha256 of all that decides runs and verdicts; not of the words around it."""
        words = {"order", "title", "question", "caveats", "figure"}
        decides = self.model_dump(mode="json", exclude=words, exclude_defaults=True)
        text = json.dumps(decides, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class StudyFile(Section):
    study: Study


def load(path: Path) -> Study:
    """Read a study file; raises UserError in one line."""
    tree = recipe_file.read_tree(path)
    if "study" not in tree.values:
        raise UserError(f"{path}: not a study; its one field is `study:`, see recipes/studies/")
    return recipe_file.validate(tree, str(path), StudyFile).study
