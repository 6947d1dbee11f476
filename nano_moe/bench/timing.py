"""Several cases timed against each other: interleaved, paired by round, in one process.

A round runs every case once. What slows the machine for a while slows a whole round, so ratios are
taken within rounds, and the median is over those.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

# Called with the number of the round, warm-ups included. A case that returns a number has timed
# itself, in seconds: by a clock or in a process of its own.
Case = Callable[[int], float | None]


class Spread(NamedTuple):
    """A median between its quartiles."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation between the sorted values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def scaled(self, factor: float) -> Spread:
        return Spread(*(value * factor for value in self))


class Budget(NamedTuple):
    """How long to go on: until `seconds` are over, but no fewer and no more rounds than these."""

    seconds: float = 10.0
    min_rounds: int = 7
    max_rounds: int = 1000
    warm_up: int = 2  # rounds before the first that counts


QUICK = Budget(seconds=0.0, min_rounds=2, warm_up=1)


class Timings:
    """Seconds of each case in each round."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]):
        self.seconds = seconds

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def spread(self, case: str) -> Spread:
        return Spread.of(self.seconds[case])

    def ratio(self, case: str, base: str) -> Spread:
        """The case's time over the base's, taken within each round."""
        pairs = zip(self.seconds[case], self.seconds[base], strict=True)
        return Spread.of([seconds / of_base for seconds, of_base in pairs])

    def fastest(self, cases: Sequence[str]) -> str:
        """The case with the lowest median."""
        return min(cases, key=lambda case: self.spread(case).median)


def interleave(
    cases: Mapping[str, Case],
    budget: Budget,
    *,
    before_round: Callable[[int], object] = lambda number: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time the cases round by round; `before_round` makes each round's input, untimed.

    Each round starts with another case and every second one runs backwards, so that no case always
    follows the same one or comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    with _without_gc():
        for number in range(budget.warm_up):
            before_round(number)
            for name in names:
                cases[name](number)
        start, last = clock(), budget.warm_up + budget.max_rounds
        for number in range(budget.warm_up, last):
            before_round(number)
            for name in _order(names, number):
                seconds[name].append(_time(cases[name], number, clock))
            if _is_enough(number + 1 - budget.warm_up, clock() - start, budget):
                break
    return Timings(seconds)


def _time(case: Case, number: int, clock: Callable[[], float]) -> float:
    start = clock()
    own = case(number)
    elapsed = clock() - start
    return elapsed if own is None else own


def _order(names: list[str], number: int) -> list[str]:
    shift = number % len(names)
    order = names[shift:] + names[:shift]
    return order if number % 2 else order[::-1]


def _is_enough(rounds: int, elapsed: float, budget: Budget) -> bool:
    """Whether one more round of typical length would not fit."""
    return rounds >= budget.min_rounds and elapsed * (rounds + 1) / rounds > budget.seconds


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """No garbage collection within a measurement; one before it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
