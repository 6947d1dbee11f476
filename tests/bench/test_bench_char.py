"""The table of the character benchmark, from losses and times that are made up."""

import pytest

from nano_moe.bench import char
from nano_moe.bench.timing import Timings

TIMES = {char.REFERENCE: [1.0, 1.0], char.DENSE: [1.2, 1.2], char.SPARSE: [2.0, 2.0]}


def rows(dense: float, sparse: float, early: list[tuple[float, float]], **times: list[float]):
    full = {char.DENSE: dense, char.SPARSE: sparse}
    return {r["decoder"]: r for r in char.table(1.8, full, early, Timings({**TIMES, **times}))}


def test_the_budget_is_where_the_reference_is_crossed_and_the_time_is_that_times_the_step():
    dense = rows(1.45, 1.4, [(0.1, 2.0), (0.2, 1.6)])[char.DENSE]
    assert dense["characters"] == pytest.approx((0.1 * 0.2) ** 0.5)  # half-way, in the logarithm
    assert dense["time"] == pytest.approx(1.2 * dense["characters"])
    assert dense["speed"].median == pytest.approx(1 / 1.2)
    assert dense["met"] is True


@pytest.mark.parametrize(
    ("dense", "early", "times"),
    [
        (1.48, [(0.1, 2.0), (0.2, 1.6)], {}),  # a gap of 0.32
        (1.45, [(0.1, 2.0), (0.3, 1.81)], {}),  # later than 0.3
        (1.45, [(0.1, 2.0), (0.2, 1.6)], {char.DENSE: [1.3, 1.3]}),  # slower than 0.8
        (1.45, [(0.1, 1.7), (0.2, 1.6)], {}),  # nobody knows when
    ],
)
def test_each_target_counts(dense, early, times):
    assert rows(dense, 1.4, early, **times)[char.DENSE]["met"] is False


def test_the_sparse_twin_has_to_be_below_the_dense_one():
    early = [(0.1, 2.0), (0.2, 1.6)]
    assert rows(1.45, 1.44, early)[char.SPARSE]["met"] is True
    assert rows(1.45, 1.46, early)[char.SPARSE]["met"] is False
    assert rows(1.45, 1.44, early)[char.REFERENCE]["met"] is None
