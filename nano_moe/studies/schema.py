"""What a study file says: a claim, its source, the runs that test it, and the verdict's rule.

A file is `study:` with the fields of `Study`. Members name recipe files, relative to the study's
own, and the fields that they change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from nano_moe import recipe_file
from nano_moe.config import FieldFault, Section
from nano_moe.errors import UserError

TRAINED = (
    "ce", "bpb", "max_vio", "max_share", "dead_experts", "starved_experts", "load_entropy",
    "dropped_share",
)  # fmt: skip
MEASURED = ("memory_gb", "train_ms_per_token", "decode_ms_per_token")
DECODED = (
    "memory_gb", "decode_ms_per_token", "cold_ms_per_token", "half_speed_ms_per_token", "hits",
)  # fmt: skip
EXCHANGED = ("exchange_bytes", "formula_bytes", "exchange_ms", "rest_ms", "step_ms")
LOOKED = {
    "specialization": (
        "domain_information", "class_information", "token_information", "domain_share",
        "class_share",
    ),
    "leak": ("ce_whole", "ce_other_future", "ce_own_future", "ce_prefix"),
    "offload": (
        "chance_25", "lru_hits_25", "hits_25", "chance_50", "lru_hits_50", "hits_50",
        "guesses_right",
    ),
    "exchange": ("copies", "chance_copies"),
}  # fmt: skip
ALL = "all"  # a budget for which no expert stays on disk
MAY_BE_ZERO = (
    "max_vio", "dead_experts", "starved_experts", "load_entropy", "dropped_share", "hits",
    *LOOKED["specialization"], *LOOKED["offload"],
)  # fmt: skip
FIGURES = (
    *TRAINED, *MEASURED, *DECODED, *EXCHANGED,
    *(name for names in LOOKED.values() for name in names),
)  # fmt: skip
Equal = Literal["seeds", "tokens", "flops", "time", "active", "total"]
Item = TypeVar("Item")


def _single(given: Any) -> Any:
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError("must be a finite number")
    if not isinstance(given, bool | int | float | str | None):
        raise ValueError("must be a single value; give each field of a block its own line")
    return given


def _known_figure(given: str) -> str:
    if given not in FIGURES:
        raise ValueError(f"no figure '{given}'; there are {', '.join(FIGURES)}")
    return given


def _share(given: str) -> str:
    if given != ALL and not re.fullmatch(r"\d+(\.\d+)?%", given):
        raise ValueError(f"'{given}' is no share of the experts; give {ALL}, or such as 25%")
    return given


def _heading(given: str) -> str:
    if given != " ".join(given.split()) or "|" in given:
        raise ValueError("must be one line of words; drop the line break, |, or spaces around")
    return given


Figure = Annotated[str, AfterValidator(_known_figure)]
Value = Annotated[bool | int | float | str | None, BeforeValidator(_single)]

FULL: dict[str, Value] = {  # of every run
    "trainer.val_every": 1_000_000,  # the end alone: what is trained on is not seen twice
    "trainer.save_every": 100,  # at most a minute of work is lost
}


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
    expert_budget: Annotated[str, AfterValidator(_share)] | None = Field(
        default=None,
        description="measure decoding alone, with this share of experts in memory: 25%, or all",
    )
    expert_ranks: int | None = Field(
        default=None,
        ge=2,
        description="measure training by so many processes here, which share out the experts",
    )
    look: Literal["specialization", "leak", "offload", "exchange"] | None = Field(
        default=None, description="what else is read from the trained weights"
    )
    start_from: str | None = Field(
        default=None, description="the dense member that is upcycled; its run of the next seed"
    )
    seeds: Listed[int] | None = Field(
        default=None, min_length=1, description="fewer than the study's; omitted: all of them"
    )

    @property
    def figures(self) -> tuple[str, ...]:
        """What its runs are compared in."""
        if self.measure:
            budget = DECODED if self.expert_budget else MEASURED
            return EXCHANGED if self.expert_ranks else budget
        return (*TRAINED, *(LOOKED[self.look] if self.look else ()))


class Comparison(Section):
    """One sentence of the claim: `better` has the lower figure, by the effect or more.

    A member is compared with itself where `than_figure` is another.
    """

    says: str = Field(min_length=1, description="the claim, such as: top-2 ends below dense")
    better: str = Field(description="the member that the claim favours")
    than: str = Field(description="the member that it is compared with")
    equal: Listed[Equal] = Field(
        default=("seeds",), description="what is held equal, and checked before the runs"
    )
    figure: Figure = Field(default="ce", description="lower is better; routing: the worst layer")
    than_figure: Figure | None = Field(default=None, description="of `than`; omitted: the same")
    higher: bool = Field(default=False, description="the claim is that `better` has more of it")
    relative: bool = Field(
        default=False, description="compare logarithms: factors, not differences"
    )
    smallest_effect: float = Field(
        gt=0, description="the smallest difference worth claiming; relative: a factor minus 1"
    )


class Trend(Section):
    """One sentence of the claim about a slope over the logarithm to base 2 of what is varied.

    A line's points are members, whose figure falls, or pairs (better, than), whose gap grows.
    Every line and seed has a slope of its own.
    """

    says: str = Field(min_length=1, description="the claim, such as: the lead grows with tokens")
    per: str = Field(min_length=1, description="the unit, such as: doubling of tokens")
    lines: Listed[dict[str, str | Listed[str]]] = Field(
        min_length=1, description="by the number varied: a member, or [better, than]"
    )
    equal: Listed[Equal] = Field(default=("seeds",), description="within each pair")
    figure: Figure = Field(default="ce", description="lower is better")
    smallest_effect: float = Field(gt=0, description="the smallest slope worth claiming")

    def pair(self, better: str, than: str) -> Comparison:
        """What is compared at a point that is a pair."""
        return Comparison(
            says=self.says, better=better, than=than, equal=self.equal, figure=self.figure,
            smallest_effect=self.smallest_effect,
        )  # fmt: skip

    @property
    def pairs(self) -> list[Comparison]:
        """The comparisons at all points that are pairs."""
        points = [point for line in self.lines for point in line.values()]
        return [self.pair(*point) for point in points if not isinstance(point, str)]


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
    title: Annotated[str, AfterValidator(_heading)] = Field(
        min_length=1, max_length=60, description="a heading"
    )
    question: str = Field(min_length=1, description="what a reader wants to know")
    claim: str = Field(min_length=1, description="what was published, in a sentence of ours")
    source: str = Field(min_length=1, description="where")
    seeds: Listed[int] = Field(min_length=1, description="each member runs once per seed")
    fields: dict[str, Value] = Field(default={}, description="overrides that all members share")
    members: dict[str, Member] = Field(min_length=1, description="by the name that tables give")
    comparisons: Listed[Comparison] = Field(default=(), description="the rule")
    trends: Listed[Trend] = Field(default=(), description="more of the rule")
    grid: Grid | None = Field(default=None, description="instead of comparisons")
    timed: Listed[str] = Field(
        default=(), description="members whose steps are timed beside each other after the runs"
    )
    repeats: str | None = Field(
        default=None, description="the study that this one draws again, with other seeds"
    )
    step_times: dict[str, float] = Field(
        default={}, description="seconds a step over those of the first, for `equal: [time]`"
    )
    recovered: Recovered | None = Field(default=None, description="a share of a gain, and its cost")
    varies: Listed[str] = Field(
        default=(), description="fields of text, batches, rates or precision that it is about"
    )
    figure: Literal[
        "curves",
        "flops",
        "balance",
        "memory",
        "grid",
        "trend",
        "price",
        "specialization",
        "leak",
        "offload",
        "exchange",
    ] = Field(default="curves", description="what is drawn beside the comparisons")
    caveats: Listed[str] = Field(default=(), description="what the runs cannot say")

    @model_validator(mode="after")
    def _check(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise FieldFault("seeds", "a seed is named twice; name each once")
        if (self.grid is None) == (not self.comparisons and not self.trends):
            raise FieldFault("comparisons", "give comparisons or trends, or a grid, and not both")
        for where, fields in self._all_fields():
            if "seed" in fields:
                raise FieldFault(where, "seeds are the study's own; write it under seeds")
            if set_for_all := sorted(FULL.keys() & fields.keys()):
                raise FieldFault(where, f"{set_for_all[0]} is the same in every study; drop it")
        for name, member in self.members.items():
            self._check_source(f"members.{name}", name, member)
        if self.grid is not None:
            self._check_grid(self.grid)
        for number, comparison in enumerate(self.comparisons):
            self._check_comparison(f"comparisons.{number}", comparison)
        for number, trend in enumerate(self.trends):
            self._check_trend(f"trends.{number}", trend)
        for side, name in (self.recovered.model_dump() if self.recovered else {}).items():
            self._check_member(f"recovered.{side}", name)
            if self.members[name].measure or self.members[name].seeds is not None:
                raise FieldFault(f"recovered.{side}", f"'{name}' is not trained with every seed")
        for name in (*self.step_times, *self.timed):
            self._check_member("step_times" if name in self.step_times else "timed", name)
        self._check_figure()
        return self

    def _all_fields(self) -> list[tuple[str, dict[str, Value]]]:
        own = [(f"members.{name}.fields", member.fields) for name, member in self.members.items()]
        return [("fields", self.fields), *own]

    def _check_grid(self, grid: Grid) -> None:
        if list(grid.values) != sorted(set(grid.values)):
            raise FieldFault("grid.values", "must rise, each value named once")
        if len(self.seeds) > 1:
            raise FieldFault("seeds", "a grid has one seed, that no other study uses")
        if self.trends or self.timed or self.step_times or self.recovered:
            raise FieldFault("grid", "drop trends, timed, step_times and recovered beside it")
        for name, member in self.members.items():
            if member.measure or member.start_from is not None:
                raise FieldFault(f"members.{name}", "a grid's members are trained from nothing")

    def _check_figure(self) -> None:
        looks = {member.look for member in self.members.values()}
        if (self.figure == "grid") != (self.grid is not None):
            raise FieldFault("figure", "grid is for a grid, and for nothing else")
        measured = [member.measure for member in self.members.values()]
        if self.figure == "memory" and not any(measured):
            raise FieldFault("figure", "draws what is measured; set measure: true")
        if self.figure in ("flops", "price") and any(measured):
            raise FieldFault("figure", "draws losses, and a member with measure: true has none")
        if self.figure in ("curves", "balance") and all(measured):
            raise FieldFault("figure", "draws trainings, and every member has measure: true")
        if self.figure == "trend" and not self.trends:
            raise FieldFault("figure", "draws trends, and there is none")
        if self.figure in LOOKED and self.figure not in looks:
            raise FieldFault("figure", f"draws a look that no member has; set look: {self.figure}")

    def _check_comparison(self, where: str, comparison: Comparison) -> None:
        figures = {"better": comparison.figure, "than": comparison.than_figure or comparison.figure}
        for side, figure in figures.items():
            name = getattr(comparison, side)
            self._check_member(f"{where}.{side}", name)
            known = self.members[name].figures
            if figure not in known:
                raise FieldFault(
                    f"{where}.figure", f"'{name}' has no {figure}; it has {', '.join(known)}"
                )
        if comparison.better == comparison.than and len(set(figures.values())) == 1:
            raise FieldFault(f"{where}.than", "is the same member; name the other one")
        zero = [figure for figure in figures.values() if figure in MAY_BE_ZERO]
        if comparison.relative and zero:
            raise FieldFault(f"{where}.relative", f"{zero[0]} may be 0, which has no factor")
        self._check_shared_seed(f"{where}.than", (comparison.better, comparison.than))

    def _check_shared_seed(self, where: str, names: Sequence[str]) -> None:
        if not set.intersection(*(set(self.members[n].seeds or self.seeds) for n in names)):
            raise FieldFault(where, f"{', '.join(names)} have no seed in common")

    def _check_trend(self, where: str, trend: Trend) -> None:
        for number, line in enumerate(trend.lines):
            here = f"{where}.lines.{number}"
            if len(line) < 3 or not all(_positive(x) for x in line):
                raise FieldFault(here, "a line has three points or more, each above a number > 0")
            for x, point in line.items():
                members = (point,) if isinstance(point, str) else point
                if len(members) not in (1, 2) or isinstance(point, tuple) != (len(members) == 2):
                    raise FieldFault(f"{here}.{x}", "is a member, or a pair of them")
                for name in members:
                    self._check_member(f"{here}.{x}", name)
                    if trend.figure not in self.members[name].figures:
                        raise FieldFault(f"{where}.figure", f"'{name}' has no {trend.figure}")
            points = [(p,) if isinstance(p, str) else p for p in line.values()]
            self._check_shared_seed(here, list(dict.fromkeys(n for point in points for n in point)))
        for pair in trend.pairs:
            self._check_comparison(where, pair)

    def _check_source(self, where: str, name: str, member: Member) -> None:
        if member.seeds is not None and not set(member.seeds) <= set(self.seeds):
            raise FieldFault(f"{where}.seeds", "has a seed that the study has not")
        for field in ("expert_budget", "expert_ranks"):
            if getattr(member, field) is not None and not member.measure:
                raise FieldFault(f"{where}.{field}", "is of what is measured; set measure: true")
        if member.expert_budget is not None and member.expert_ranks is not None:
            raise FieldFault(f"{where}.expert_ranks", "hold all experts; drop expert_budget")
        if member.start_from is None:
            return
        self._check_member(f"{where}.start_from", member.start_from)
        source = self.members[member.start_from]
        if source.start_from is not None or source.seeds is not None or len(self.seeds) < 2:
            raise FieldFault(
                f"{where}.start_from",
                "needs two seeds, and a member of all of them that itself starts from none",
            )

    def _check_member(self, where: str, name: str) -> None:
        if name not in self.members:
            raise FieldFault(where, f"no member '{name}'; there are {', '.join(self.members)}")

    @property
    def rule(self) -> str:
        """The sha256 of all that decides runs and verdicts; not of the words around it."""
        text = json.dumps(self.deciding(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def deciding(self) -> dict[str, Any]:
        """What the rule is made of; defaults left out."""
        words = {"order", "title", "question", "varies", "caveats", "figure"}
        return self.model_dump(mode="json", exclude=words, exclude_defaults=True)


def _positive(x: str) -> bool:
    try:
        return float(x) > 0
    except ValueError:
        return False


class StudyFile(Section):
    study: Study


def load(path: Path) -> Study:
    """Read a study file; raises UserError in one line."""
    tree = recipe_file.read_tree(path)
    if "study" not in tree.values:
        raise UserError(f"{path}: not a study; its one field is `study:`, see recipes/studies/")
    return recipe_file.validate(tree, str(path), StudyFile).study
