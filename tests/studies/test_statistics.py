"""Intervals against a table of Student's t, and verdicts against their definition."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.studies.statistics import Interval, interval, ratio_interval, verdict

# Two-sided 95 %, from printed tables: degrees of freedom -> t.
T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042}
FIGURES = st.floats(-10, 10)


@pytest.mark.parametrize("freedom", T_TABLE)
def test_the_interval_is_students(freedom):
    """Values at +1 and -1 in equal number (and 0 where n is odd) have a known spread."""
    n = freedom + 1
    values = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
    deviation = math.sqrt(2 * (n // 2) / freedom)
    half = T_TABLE[freedom] * deviation / math.sqrt(n)
    found = interval(values)
    assert found.mean == 0 and found.n == n
    assert found.high == pytest.approx(half, rel=1e-3) and found.low == pytest.approx(-half, 1e-3)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_gain_that_is_called_detectable_is_told_from_zero_four_times_in_five(n):
    draw = random.Random(n)

    def drawn(gain):
        return interval([draw.gauss(gain, 1) for _ in range(n)])

    half = T_TABLE[n - 1] / math.sqrt(n)  # of a spread of exactly 1
    gain = Interval(0.0, -half, half, n).detectable
    assert sum(drawn(gain).low > 0 for _ in range(4000)) / 4000 == pytest.approx(0.8, abs=0.025)
    assert interval([1.0, 1.0, 1.0]).detectable == 0 and interval([1.0]).detectable == math.inf


def test_one_in_twenty_intervals_misses_the_truth_at_three_seeds():
    draw = random.Random(0)
    found = [interval([draw.gauss(0.3, 1) for _ in range(3)]) for _ in range(4000)]
    missed = sum(not one.low <= 0.3 <= one.high for one in found) / len(found)
    assert 0.04 < missed < 0.06


def test_bounds_of_a_ratio_are_where_the_difference_is_just_told_from_zero():
    over, under = [0.10, 0.11, 0.09, 0.12], [0.026, 0.015, 0.043, 0.03]
    found = ratio_interval(over, under)
    assert found.mean == pytest.approx(sum(over) / sum(under))
    for ratio, side in ((found.low, "low"), (found.high, "high")):
        rest = interval([a - ratio * b for a, b in zip(over, under, strict=True)])
        assert getattr(rest, side) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="not told from zero"):
        ratio_interval(over, [-0.02, 0.02, 0.03, -0.01])


def test_one_in_twenty_intervals_of_a_ratio_misses_the_truth():
    draw = random.Random(0)
    missed = 0
    for _ in range(4000):
        under = [draw.gauss(1.0, 0.2) for _ in range(5)]
        found = ratio_interval([3 * u + draw.gauss(0, 0.3) for u in under], under)
        missed += not found.low <= 3 <= found.high
    assert 0.04 < missed / 4000 < 0.06


def test_one_seed_decides_nothing():
    assert verdict(interval([5.0]), 0.01) == "undecided at this scale"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 0.0]])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ValueError, match="differences"):
        interval(values)


@pytest.mark.parametrize(
    ("low", "mean", "high", "expected"),
    [
        (0.01, 0.03, 0.05, "reproduced"),
        (0.001, 0.01, 0.019, "not reproduced"),  # not zero, but too small to claim
        (0.001, 0.015, 0.029, "undecided at this scale"),
        (-0.01, 0.03, 0.07, "undecided at this scale"),
        (-0.05, -0.03, -0.01, "reversed"),
        (-0.019, -0.01, -0.001, "not reproduced"),
        (-0.01, 0.0, 0.01, "not reproduced"),
        (-0.03, 0.0, 0.03, "undecided at this scale"),
    ],
)
def test_verdicts(low, mean, high, expected):
    assert verdict(Interval(mean, low, high, 5), 0.02) == expected


@given(st.lists(FIGURES, min_size=2, max_size=6), st.floats(0.01, 5))
def test_a_claim_and_its_opposite_have_opposite_verdicts(values, smallest):
    mirror = {"reproduced": "reversed", "reversed": "reproduced"}
    one = verdict(interval(values), smallest)
    other = verdict(interval([-value for value in values]), smallest)
    assert other == mirror.get(one, one)
