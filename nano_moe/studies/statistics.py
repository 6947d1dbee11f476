"""Paired differences over seeds, and the verdict that a rule fixed beforehand reads from them.

Student's t, because the seeds are few: a percentile bootstrap of three values calls noise
significant every fourth time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from scipy import stats
from scipy.optimize import brentq

Verdict = Literal["reproduced", "reversed", "not reproduced", "undecided at this scale"]
LEVEL, POWER = 0.95, 0.8


class Interval(NamedTuple):
    """The mean of n paired differences, and where it lies at LEVEL."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def detectable(self) -> float:
        """The smallest true gain that is told from zero with POWER, at this spread and n.

        Infinite for a single difference. Of the noncentral t distribution (Cohen 1988, ch. 2).
        """
        if self.n == 1:
            return math.inf
        beyond = float(stats.t.ppf((1 + LEVEL) / 2, self.n - 1))
        standard_error = (self.high - self.low) / 2 / beyond

        def missing(shift: float) -> float:
            return float(stats.nct.sf(beyond, self.n - 1, shift)) - POWER

        return standard_error * float(brentq(missing, 0.0, 10 * beyond))


def interval(differences: Sequence[float]) -> Interval:
    """Student's t interval of the mean; without bounds for a single difference.

    Raises ValueError without any difference, or with one that is no number.
    """
    n = len(differences)
    if n == 0 or not all(map(math.isfinite, differences)):
        raise ValueError("differences: at least one is needed, and all finite")
    mean = statistics.fmean(differences)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> Interval:
    """The ratio of two means of paired differences: of sums, and not the mean of ratios.

    Its bounds are the ratios r at which the interval of `over - r * under` ends at zero (Fieller
    1954). Raises ValueError where the interval of `under` holds zero: there is no bound then.
    """
    below = interval(under)
    if below.low <= 0 <= below.high:
        raise ValueError("under: not told from zero, so no ratio to it has bounds")
    ratio = statistics.fmean(over) / below.mean
    if below.n == 1:
        return Interval(ratio, -math.inf, math.inf, 1)
    factor = float(stats.t.ppf((1 + LEVEL) / 2, below.n - 1)) ** 2 / below.n
    # The r at which (mean over - r * mean under)^2 = factor * variance of over - r * under.
    square = below.mean**2 - factor * statistics.variance(under)
    linear = statistics.fmean(over) * below.mean - factor * statistics.covariance(over, under)
    rest = statistics.fmean(over) ** 2 - factor * statistics.variance(over)
    half = math.sqrt(max(linear**2 - square * rest, 0.0))
    return Interval(ratio, (linear - half) / square, (linear + half) / square, below.n)


def verdict(gain: Interval, smallest_effect: float) -> Verdict:
    """What a gain, positive on the claimed side, says about a claim of `smallest_effect` or more.

    Reproduced: zero is excluded and the mean is at least that effect. Reversed: the same on the
    other side. Not reproduced: all of the interval is smaller than that effect.
    """
    if gain.low > 0 and gain.mean >= smallest_effect:
        return "reproduced"
    if gain.high < 0 and gain.mean <= -smallest_effect:
        return "reversed"
    if -smallest_effect < gain.low and gain.high < smallest_effect:
        return "not reproduced"
    return "undecided at this scale"
