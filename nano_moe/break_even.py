"""How much of a dense run's budget a sparse run needs for the same loss.

Every point is a finished run whose own schedule ends at its budget: a figure inside a longer
schedule is pessimistic, so it does not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from nano_moe.comparison import read_curve
from nano_moe.errors import UserError
from nano_moe.runs import Run, first_difference

SHORTEST = 0.5  # of the dense budget; shorter sparse runs belong to a smaller one


class Point(NamedTuple):
    """Where one run ended."""

    name: str
    seed: int
    corpus: str
    precision: str
    tokens: int
    ce: float


def break_even(dense: list[Run], sparse: list[Run]) -> list[dict[str, Any]]:
    """One row per dense run: the share of its tokens at which sparse runs of its seed end as low.

    `share` is None where no two sparse runs lie on either side; `below` and `above` are then the
    bounds that are known. Raises UserError for a run that has not ended, and for runs that differ
    in more than seed, steps and, between the sides, model and rates.
    """
    for side, are_sparse in ((dense, False), (sparse, True)):
        _check_kind(side, are_sparse)
        _check_alike(side)
    ends = [end_of(run) for run in sparse]
    rows = [_row(one, ends) for one in map(end_of, dense)]
    return sorted(rows, key=lambda row: (row["tokens"], row["seed"]))


def _check_kind(side: list[Run], are_sparse: bool) -> None:
    """Raises UserError for a run that belongs on the other side."""
    for run in side:
        if (run.recipe().model.moe is not None) != are_sparse:
            found = "has no experts" if are_sparse else "has experts"
            raise UserError(f"{run.name}: {found}; name it among the other side's runs")


def _check_alike(side: list[Run]) -> None:
    """Raises UserError where the runs of one side are of different recipes."""
    first, *others = [(run, _what_counts(run)) for run in side]
    for run, fields in others:
        field = first_difference(first[1], fields)
        if field is not None:
            raise UserError(
                f"{first[0].name} and {run.name} differ in {field}: one curve is of one recipe; "
                "compare them apart"
            )


def _what_counts(run: Run) -> dict[str, Any]:
    """A recipe's fields but for seed, budget, text (the corpus is compared) and housekeeping."""
    fields = run.recipe().model_dump(mode="json", exclude={"seed", "data"})
    for name in ("steps", "val_every", "save_every", "log_every", "sample_prompt"):
        del fields["trainer"][name]
    return fields


def end_of(run: Run) -> Point:
    """The last validation of a finished run."""
    recipe, curve, manifest = run.recipe(), read_curve(run), run.manifest()
    tokens = recipe.trainer.steps * recipe.tokens_per_step
    if curve.spent["tokens"][-1] != tokens:
        raise UserError(
            f"{run.path}: its schedule has not ended; finish it with `make resume RUN={run.name}`"
        )
    if not math.isfinite(curve.ce[-1]):
        raise UserError(f"{run.path}: its loss is {curve.ce[-1]}; leave it out")
    corpus = str(manifest.get("corpus", {}).get("sha256", ""))
    precision = recipe.trainer.precision
    return Point(run.name, recipe.seed, corpus, precision, tokens, curve.ce[-1])


def _row(dense: Point, ends: Iterable[Point]) -> dict[str, Any]:
    others = [end for end in ends if end.seed == dense.seed]
    points = sorted((p for p in others if SHORTEST <= p.tokens / dense.tokens < 1), key=_tokens)
    if not points:
        raise UserError(
            f"{dense.name}: no sparse run of seed {dense.seed} has between {SHORTEST:g} and all of "
            f"its {dense.tokens:,} tokens; train some, for instance at 0.6, 0.75 and 0.9"
        )
    for point in points:
        if point.corpus != dense.corpus:
            raise UserError(f"{point.name} and {dense.name} were trained on different text")
        if point.precision != dense.precision:
            raise UserError(
                f"{point.name} was trained in {point.precision} and {dense.name} in "
                f"{dense.precision}; train both in one precision"
            )
    for one, other in zip(points, points[1:], strict=False):
        if one.tokens == other.tokens:
            raise UserError(f"{one.name} and {other.name} have the same seed and budget; drop one")
    shares = [(point.tokens / dense.tokens, point.ce) for point in points]
    return {
        "tokens": dense.tokens,
        "seed": dense.seed,
        "dense": dense.name,
        "dense_ce": dense.ce,
        "sparse": [{"run": p.name, "tokens": p.tokens, "ce": p.ce} for p in points],
        "share": share_at(dense.ce, shares),
        "above": max((share for share, ce in shares if ce > dense.ce), default=None),
        "below": min((share for share, ce in shares if ce <= dense.ce), default=None),
    }


def _tokens(point: Point) -> int:
    return point.tokens


def share_at(ce: float, shares: list[tuple[float, float]]) -> float | None:
    """Where the loss first crosses `ce`, linear in the logarithm of the budget; None outside.

    (share, loss) in order of shares. A first point that is as low already is no crossing.
    """
    if shares[0][1] <= ce:
        return None
    for (x0, y0), (x1, y1) in zip(shares, shares[1:], strict=False):
        if y0 > ce >= y1:
            return math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * (y0 - ce) / (y0 - y1))
    return None


def by_budget(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Rows of equal dense budget, smallest budget first."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["tokens"]].append(row)
    return dict(sorted(groups.items()))
