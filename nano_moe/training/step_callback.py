"""A callback that acts once per optimizer step, whatever the accumulation."""

from __future__ import annotations

from typing import Any

import lightning as L


class StepCallback(L.Callback):
    """Subclasses say what follows an optimizer step; `outputs` are of its last micro-batch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.on_micro_batch_end(outputs)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, pl_module, outputs)

    def on_micro_batch_end(self, outputs: Any) -> None:
        """Called for every micro-batch, before `on_step_end`."""

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Called with `trainer.global_step` at the number of steps done."""
        raise AssertionError(f"{type(self).__name__} must say what happens after a step")
