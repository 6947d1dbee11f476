"""One of several processes, started by the test as torchrun would: all trainings in one group."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import cases

from nano_moe import ranks

LAYOUTS = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "ep": {"strategy": "ep"},
    "ep of 2": {"strategy": "ep", "expert_ranks": 2},
}


def main(jobs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in jobs:
        kind, case, layout = job.split(":")
        trainer = {"devices": ranks.count(), **LAYOUTS[layout]}
        name = job.replace(":", "-").replace(" ", "_")
        if kind == "exact":
            with cases.in_float64():
                cases.train(cases.recipe(case, **trainer), name)
        elif kind == "fp32":
            with cases.first_gradients() as gradients:
                run = cases.train(cases.recipe(case, backend="auto", **trainer), name)
            if ranks.leads():
                torch.save(gradients, run.path / "gradients.pt")
        elif kind == "half":
            with cases.in_float64(), cases.stopped_after(10):
                cases.train(cases.recipe(case, **trainer), name)
        else:  # the name of a run that another layout left half done
            overrides = [f"trainer.{field}={value}" for field, value in trainer.items()]
            with cases.in_float64():
                cases.resume(kind, overrides)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        raise
