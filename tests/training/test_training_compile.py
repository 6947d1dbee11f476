"""`trainer.compile` changes the speed, not the training."""

from __future__ import annotations

import csv
import shutil

import pytest


def losses(run) -> list[float]:
    with open(run.metrics_file, newline="") as file:
        return [float(row["train/ce"]) for row in csv.DictReader(file) if row["train/ce"]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["dense", "softmax", "hash"])
def test_compiled_training_has_the_losses_of_eager_training(workshop, kind):
    runs = {}
    for compiled in (False, True):
        changes = {"trainer__steps": 3, "trainer__log_every": 1, "trainer__compile": compiled}
        runs[compiled], _ = workshop.train(workshop.recipe(kind, **changes), f"c{compiled}")
    assert losses(runs[True]) == pytest.approx(losses(runs[False]), rel=1e-4)
