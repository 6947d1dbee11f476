"""The training progress bar: loss, tokens per second, the busiest expert's share, time left."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from nano_moe.training.alarm import LoadAlarm
from nano_moe.training.clock import Clock
from nano_moe.training.step_callback import StepCallback


class Progress(StepCallback):
    """One line on stderr, a tick per optimizer step."""

    def __init__(
        self, tokens_per_step: int, clock: Clock, validation: Any, alarm: LoadAlarm, enabled: bool
    ):
        self.tokens_per_step, self.clock, self.enabled = tokens_per_step, clock, enabled
        self.validation, self.alarm = validation, alarm
        self.bar: tqdm[Any] | None = None
        self._losses: list[Tensor] = []  # of this step's micro-batches

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="train",
            unit="step",
            disable=not self.enabled,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._from = (trainer.global_step, self.clock.read())

    def on_micro_batch_end(self, outputs: Any) -> None:
        self._losses.append(outputs["ce"])

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        ce = torch.stack(self._losses).mean()
        self._losses.clear()
        if self.bar is None:
            return
        step, seconds = trainer.global_step, self.clock.read()
        rate = (step - self._from[0]) * self.tokens_per_step / max(seconds - self._from[1], 1e-9)
        figures = {"ce": f"{ce.item():.3f}", "tok/s": f"{rate:,.0f}"}
        if self.alarm.worst_share is not None:
            figures["top expert"] = f"{self.alarm.worst_share:.0%}"
        if self.validation.latest is not None:
            figures["val"] = f"{self.validation.latest.overall.ce:.3f}"
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()  # else the fault would continue the bar's line

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
