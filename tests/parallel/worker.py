"""One of several processes, started by the test as torchrun would: all trainings in one group."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import cases

from nano_moe import ranks
from nano_moe.errors import SaidElsewhere, UserError
from nano_moe.training.module import Decoder

LAYOUTS = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "ep": {"strategy": "ep"},
    "ep of 2": {"strategy": "ep", "expert_ranks": 2},
}
SPECIAL = {"bf16": {"precision": "bf16"}, "compiled": {"compile": True}}


def broken(case: str, trainer: dict[str, Any], name: str) -> None:
    """The last process alone sees a loss that is none; all must end, and one says it."""
    original = Decoder.training_step

    def training_step(self: Decoder, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        output = original(self, batch, batch_idx)
        if self.global_step == 3 and ranks.rank() == ranks.count() - 1:
            output["loss"].register_hook(lambda grad: grad * torch.nan)
        return output

    Decoder.training_step = training_step
    try:
        cases.train(cases.recipe(case, **trainer), name)
    except UserError as error:
        assert "step 4: " in str(error), error
        assert isinstance(error, SaidElsewhere) != ranks.leads()
    else:
        raise AssertionError("trained on")
    finally:
        Decoder.training_step = original


def work(kind: str, case: str, trainer: dict[str, Any], name: str) -> None:
    if kind == "exact":
        with cases.in_float64():
            cases.train(cases.recipe(case, **trainer), name)
    elif kind == "fp32":
        with cases.first_gradients() as gradients:
            run = cases.train(cases.recipe(case, backend="auto", **trainer), name)
        if ranks.leads():
            torch.save(gradients, run.path / "gradients.pt")
    elif kind in SPECIAL:
        cases.train(cases.recipe(case, backend="auto", **SPECIAL[kind], **trainer), name)
        if kind == "compiled":
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    elif kind == "broken":
        broken(case, trainer, name)
    elif kind == "half":
        cases.train_half(cases.recipe(case, **trainer), name)
    else:  # the name of a run that another layout left half done
        with cases.in_float64():
            cases.resume(kind, cases.overrides(trainer))


def main(jobs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in jobs:
        kind, case, layout = job.split(":")
        trainer = {"devices": ranks.count(), **LAYOUTS[layout]}
        work(kind, case, trainer, cases.folder_of(job))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        raise
