"""The statistics of timings, on a clock that the cases themselves advance."""

import gc

import pytest

from nano_moe.bench.report import Report
from nano_moe.bench.timing import Budget, Spread, Timings, interleave


class Clock:
    """Time passes only where a case says so."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def case(self, name, seconds):
        def run(number):
            self.calls.append((number, name))
            self.now += seconds(number)

        return run


@pytest.fixture
def clock():
    return Clock()


def test_quartiles_of_numbers_worked_by_hand():
    assert Spread.of([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert Spread.of([1, 2, 3, 4]) == (1.75, 2.5, 3.25)
    assert Spread.of([7]) == (7, 7, 7)
    assert Spread(1, 2, 3).scaled(10) == (10, 20, 30)


def test_ratios_are_taken_within_rounds():
    """A machine that slows down tenfold leaves the ratio alone, and the medians would not."""
    timings = Timings({"a": [2, 20, 2, 30, 3], "b": [1, 10, 1, 10, 1]})
    assert timings.ratio("a", "b") == (2, 2, 3)
    assert timings.spread("a").median / timings.spread("b").median == 3
    assert timings.ratio("b", "b") == (1, 1, 1)
    assert timings.fastest(["a", "b"]) == "b" and timings.rounds == 5


def test_warm_up_rounds_do_not_count(clock):
    cases = {"a": clock.case("a", lambda number: 100 if number < 2 else number)}
    timings = interleave(cases, Budget(0, min_rounds=3, warm_up=2), clock=clock)
    assert timings.seconds == {"a": [2, 3, 4]}


def test_every_round_runs_every_case_once_on_one_input(clock):
    prepared = []
    cases = {name: clock.case(name, lambda number: 1) for name in "abc"}
    budget = Budget(0, min_rounds=6, warm_up=1)
    interleave(cases, budget, before_round=prepared.append, clock=clock)
    assert prepared == list(range(7))
    rounds = [clock.calls[i : i + 3] for i in range(0, 21, 3)]
    for number, played in enumerate(rounds):
        assert {n for n, _ in played} == {number} and {name for _, name in played} == set("abc")
    assert {played[0][1] for played in rounds[1:]} == set("abc"), "each case comes first at times"


def test_what_a_round_is_prepared_with_is_not_timed(clock):
    def prepare(number):
        clock.now += 1000

    timings = interleave(
        {"a": clock.case("a", lambda number: 2)},
        Budget(0, min_rounds=2, warm_up=0),
        before_round=prepare,
        clock=clock,
    )
    assert timings.seconds == {"a": [2, 2]}


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [
        (Budget(seconds=10, min_rounds=2), 5),  # of 2 seconds each
        (Budget(seconds=11.9, min_rounds=2), 5),  # a sixth would not fit
        (Budget(seconds=1, min_rounds=3), 3),
        (Budget(seconds=1000, min_rounds=1, max_rounds=4), 4),
    ],
)
def test_rounds_go_on_until_the_budget_is_spent(clock, budget, rounds):
    cases = {name: clock.case(name, lambda number: 1) for name in "ab"}
    assert interleave(cases, budget, clock=clock).rounds == rounds


def test_a_case_may_bring_its_own_seconds(clock):
    def own(number):
        clock.now += 50
        return 0.25

    timings = interleave({"a": own}, Budget(0, min_rounds=2, warm_up=0), clock=clock)
    assert timings.seconds == {"a": [0.25, 0.25]}


def test_garbage_waits_until_the_end_even_when_a_case_fails(clock):
    seen = []

    def fail(number):
        seen.append(gc.isenabled())
        raise ValueError

    with pytest.raises(ValueError):
        interleave({"a": fail}, Budget(0), clock=clock)
    assert seen == [False] and gc.isenabled()


def test_a_report_is_plain_values_for_json():
    rows = [{"case": "a", "ms": Spread(1.0, 2.0, 3.0), "target": None}]
    content = Report("t", rows, ("n",)).as_json()
    assert content["rows"] == [
        {"case": "a", "ms": {"lower": 1.0, "median": 2.0, "upper": 3.0}, "target": None}
    ]
    assert content["notes"] == ["n"] and {"cpu", "threads", "torch"} <= content["machine"].keys()
