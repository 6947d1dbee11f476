"""One optimizer step as a trainer takes it, and nothing else: the loop to compare with.

Shapes: B batch, T time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nano_moe.training.module import Decoder

PARTS = ("forward", "backward", "optimizer")


class BareStep:
    """Steps of a module on batches by number, (B, T + 1); recipes with accumulation are not for it.

    Keeps the seconds of each part: forward with balancing terms, backward, and for the optimizer
    gradient norm, clip, update, zeroing and schedule.
    """

    def __init__(self, module: Decoder, batch: Callable[[int], Tensor]):
        assert module.recipe.trainer.accumulate == 1
        self.module, self.batch = module, batch
        (self.optimizer,), (schedule,) = module.configure_optimizers()
        self.scheduler = schedule["scheduler"]
        self.bf16 = module.recipe.trainer.precision == "bf16"
        self.tokens = module.recipe.tokens_per_step
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def run(self, number: int) -> float:
        """Take a step; its seconds, which making the batch is not part of."""
        batch = self.batch(number)
        times = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.module.training_step(batch, number)["loss"]
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.module.on_before_optimizer_step(self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        times.append(time.perf_counter())
        for part, start, end in zip(PARTS, times, times[1:], strict=False):
            self.seconds[part].append(end - start)
        return times[-1] - times[0]

    def shares(self, rounds: int) -> dict[str, float]:
        """Each part's median share of the last `rounds` steps."""
        steps = list(zip(*(self.seconds[part][-rounds:] for part in PARTS), strict=True))
        return {
            part: statistics.median(times[i] / sum(times) for times in steps)
            for i, part in enumerate(PARTS)
        }
