"""Figures of several runs, by hand."""

import pytest

from nano_moe.studies import verdicts
from nano_moe.studies.schema import Comparison, Recovered

NAMES = Recovered(base="dense", part="sparse", whole="large")
MEMBERS = {
    "dense": {"train_flops": 10},
    "sparse": {"train_flops": 12},
    "large": {"train_flops": 48},
}


def runs(**losses):
    return {name: {s: {"ce": ce} for s, ce in enumerate(of)} for name, of in losses.items()}


def test_a_share_is_of_the_gain_seed_by_seed():
    found = verdicts.recovered(
        NAMES, runs(dense=(4.0, 4.1), sparse=(3.95, 4.07), large=(3.9, 4.0)), MEMBERS
    )
    assert found["shares"] == pytest.approx({"0": 0.5, "1": 0.3})
    assert found["mean"] == pytest.approx(0.4) and found["flops_share"] == 0.25


def test_there_is_no_share_of_a_gain_within_noise():
    losses = runs(dense=(4.0, 4.1, 4.2), sparse=(3.9, 4.0, 4.1), large=(3.99, 4.11, 4.19))
    assert verdicts.recovered(NAMES, losses, MEMBERS) is None


@pytest.mark.parametrize(
    ("relative", "mean", "verdict"), [(False, 1.0, "reproduced"), (True, 0.693147, "reproduced")]
)
def test_a_gain_is_a_difference_or_the_logarithm_of_a_factor(relative, mean, verdict):
    one = Comparison(
        says="s", better="a", than="b", relative=relative, smallest_effect=0.9, figure="max_vio"
    )
    sides = {"a": {1: {"max_vio": 1.0}, 2: {"max_vio": 1.0}}}
    sides["b"] = {1: {"max_vio": 2.0}, 2: {"max_vio": 2.0}}
    found = verdicts.compare(one, sides, smoke=False)
    assert found["mean"] == pytest.approx(mean, rel=1e-5)
    assert (found["verdict"], found["n"]) == (verdict, 2)
    assert verdicts.compare(one, sides, smoke=True)["verdict"] == verdicts.WITHHELD
