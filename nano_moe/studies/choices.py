"""Which experts a few fixed tokens choose in the course of training.

Shapes: B windows, T time, N = B*T tokens, K top_k, L sparse layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nano_moe.device import choose_precision
from nano_moe.evaluation import autocast, spread_windows
from nano_moe.runs import Run
from nano_moe.studies.specialization import folder_of
from nano_moe.text.store import Corpus
from nano_moe.training.clock import Clock
from nano_moe.training.step_callback import StepCallback

WINDOWS = 8
POINTS = 20  # over the whole training


class Choices(StepCallback):
    """Writes the choices, (L, N, K), at a twentieth of all steps, and at the first hundredth."""

    def __init__(self, run: Run, corpus: Corpus, clock: Clock):
        self.clock, recipe = clock, run.recipe()
        self.folder, self.precision = folder_of(run), choose_precision(recipe)
        steps = recipe.trainer.steps
        self.at = {max(1, steps * point // POINTS) for point in range(1, POINTS + 1)}
        self.at |= {max(1, steps // 100)}
        self.probe = spread_windows(corpus, recipe.model.context, WINDOWS)[0]  # (B, T)

    @torch.no_grad()
    def on_step_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        if trainer.global_step in self.at:
            with self.clock.paused():
                self._write(trainer.global_step, pl_module)

    def _write(self, step: int, pl_module: Any) -> None:
        model = pl_module.model
        model.eval()
        with autocast(pl_module.device, self.precision):
            _, routings = model(self.probe.to(pl_module.device))
        model.train()
        ids = [routing.ids for routing in routings if routing is not None]
        self.folder.mkdir(exist_ok=True)
        np.save(self.folder / f"{step:07d}.npy", torch.stack(ids).cpu().numpy())
