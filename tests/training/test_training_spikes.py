"""The alarm of gradient spikes: told once, not by noise, and never a cause of anything."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.training.spikes import MEMORY, SPIKE, SpikeAlarm


def alarm(clip: float = 1.0) -> SpikeAlarm:
    return SpikeAlarm(every=10, clip=clip, enabled=True)


def told(found: SpikeAlarm, norms: list[float]) -> dict[int, str]:
    lines = {step: found.fault(step, norm) for step, norm in enumerate(norms, 1)}
    return {step: line for step, line in lines.items() if line is not None}


def test_a_spike_is_told_with_its_size_and_what_was_usual():
    (line,) = told(alarm(), [2.0] * 40 + [60.0]).values()
    assert line == "the gradient norm is 60, 30 times the usual 2; clipped to 1"
    (line,) = told(alarm(clip=0), [2.0] * 40 + [60.0]).values()
    assert line.endswith("; not clipped")


@pytest.mark.parametrize("factor", [1.0, SPIKE - 1])
def test_what_is_no_spike_is_not_told(factor):
    assert told(alarm(), [2.0] * 40 + [2.0 * factor] * 3) == {}


def test_spikes_are_told_once_in_so_many_steps_and_do_not_become_usual():
    found = told(alarm(), [2.0] * 40 + [1e6] * 25)
    assert list(found) == [41, 51, 61]
    again = told(alarm(), ([2.0] * 40 + [200.0]) * 3)
    assert list(again) == [41, 82, 123]


def test_nothing_is_told_before_the_usual_is_known():
    assert told(alarm(), [1.0] * (MEMORY - 1) + [1e9]) == {}
    assert list(told(alarm(), [1.0] * MEMORY + [1e9])) == [MEMORY + 1]


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_norm_are_no_spikes(seed):
    draw = random.Random(seed)
    norms = [math.exp(draw.gauss(0, 0.4)) * (5 * 0.99**step + 0.1) for step in range(2000)]
    assert told(alarm(), norms) == {}


@given(st.lists(st.floats(0, 1e30, allow_nan=False), max_size=60))
def test_any_finite_norm_is_taken(norms):
    told(alarm(), norms)
