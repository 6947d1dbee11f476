"""How long members' training steps take beside each other, for verdicts at equal time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nano_moe.bench.bare import BareStep
from nano_moe.bench.machine import get_ready, n_cores
from nano_moe.bench.recipes import RandomTokens
from nano_moe.bench.timing import Budget, interleave
from nano_moe.studies.plan import Planned
from nano_moe.studies.schema import Study
from nano_moe.training.module import Decoder

BUDGET = Budget(seconds=60, min_rounds=7)


def step_times(
    study: Study, planned: Sequence[Planned], budget: Budget = BUDGET
) -> dict[str, dict[str, Any]]:
    """Quartiles of each step's time over the first member's, interleaved, beside the rule's if any.

    On all cores, where runs of a study take one each: a user of one machine waits for all of it.
    """
    before = torch.get_num_threads()
    get_ready(n_cores())
    names = [*study.step_times, *study.timed]
    recipes = {one.member: one.recipe for one in planned if one.member in names}
    steps = {name: BareStep(Decoder(of), RandomTokens(of)) for name, of in recipes.items()}
    timings = interleave({name: one.run for name, one in steps.items()}, budget)
    torch.set_num_threads(before)
    return {
        name: {"rule": study.step_times.get(name), "measured": list(timings.ratio(name, names[0])),
               "rounds": timings.rounds}
        for name in recipes
    }  # fmt: skip
