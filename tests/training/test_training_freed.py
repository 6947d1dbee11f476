"""What becomes of freed memory, in a process of its own: both choices are for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nano_moe.training import fit as fit_module

SCRIPT = """
import sys
import numpy as np
from nano_moe import memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

assert all(getattr(memory, choice)() for choice in sys.argv[1:])
blocks = [np.ones(2**20) for _ in range(8)]  # 8 MiB each
held = resident()
del blocks
print(round((held - resident()) / 2**20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")
@pytest.mark.parametrize(
    ("choices", "given_back"),
    [
        (["keep_freed_memory"], 0),
        (["return_freed_memory"], 64),
        (["keep_freed_memory", "return_freed_memory"], 64),  # the last training decides
        (["return_freed_memory", "keep_freed_memory"], 0),
    ],
)
def test_large_blocks_are_kept_or_given_back(choices, given_back):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *choices], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == pytest.approx(given_back, abs=2)


@pytest.mark.parametrize(("limit", "chosen"), [(1, "return"), (2**60, "keep")])
def test_a_training_gives_back_what_it_frees_where_it_is_large(
    workshop, monkeypatch, limit, chosen
):
    asked = []
    for choice in ("return", "keep"):
        monkeypatch.setattr(
            fit_module, f"{choice}_freed_memory", lambda choice=choice: asked.append(choice)
        )
    monkeypatch.setattr(fit_module, "LARGE", limit)
    workshop.train(workshop.recipe(trainer__steps=1))
    assert asked == [chosen]
