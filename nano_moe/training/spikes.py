"""One line when the gradient is suddenly far larger than it was: a bad batch, or a run that leaves.

The step is taken all the same, with the gradient clipped as the recipe says.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning as L
from tqdm import tqdm

from nano_moe.training.step_callback import StepCallback

SPIKE = 10.0  # times the usual norm
MEMORY = 20  # steps that the usual norm is learned from, and roughly a mean of


class SpikeAlarm(StepCallback):
    """Warns of a gradient norm far above those of the steps before, once in `every` steps."""

    def __init__(self, every: int, clip: float, enabled: bool):
        self.every, self.clip, self.enabled = every, clip, enabled
        self._log_usual, self._seen = 0.0, 0
        self._silent_until = 0

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        if not self.enabled:
            return
        step = trainer.global_step
        fault = self.fault(step, pl_module.gradient_norms["total"].item())
        if fault is not None:
            tqdm.write(f"WARNING: step {step}: {fault}", file=sys.stderr)

    def fault(self, step: int, norm: float) -> str | None:
        """What is new in a step's gradient norm; a spike hardly moves what is usual."""
        usual, learned = math.exp(self._log_usual), self._seen >= MEMORY
        taken = min(norm, SPIKE * usual) if learned else norm
        self._seen += 1
        weight = 1 / min(self._seen, MEMORY)
        self._log_usual += weight * (math.log(max(taken, 1e-30)) - self._log_usual)
        if not learned or norm <= SPIKE * usual or step < self._silent_until:
            return None
        self._silent_until = step + self.every
        done = f"clipped to {self.clip:g}" if 0 < self.clip < norm else "not clipped"
        times = f"{norm / usual:.0f} times the usual {usual:.3g}"
        return f"the gradient norm is {norm:.3g}, {times}; {done}"
