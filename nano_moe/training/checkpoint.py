"""Checkpoint files that are whole or absent, and when they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import CheckpointIO

from nano_moe import ranks
from nano_moe.checkpoints import read_checkpoint
from nano_moe.errors import UserError
from nano_moe.files import replacing
from nano_moe.runs import Run
from nano_moe.training.clock import Clock
from nano_moe.training.layouts import local
from nano_moe.training.module import NonFiniteTraining
from nano_moe.training.signals import StopSignal
from nano_moe.training.step_callback import StepCallback


class AtomicCheckpointIO(CheckpointIO):
    """Write a temporary file in the same folder, fsync, rename; read with weights_only=True.

    A last.ckpt that this process wrote or read whole becomes previous.ckpt; a damaged one does not.
    """

    def __init__(self) -> None:
        self._whole: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        run = Run(path.parent)
        keep = run.previous if path == run.last and path.absolute() in self._whole else None
        try:
            with replacing(path, sealed=True, keep=keep) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise UserError(
                f"{path}: could not be written ({reason}); the one before it is untouched, "
                "free some space and resume"
            ) from error
        self._whole.add(path.absolute())

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = read_checkpoint(Path(path), "cpu")
        self._whole.add(Path(path).absolute())
        return content

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class SaveLast(StepCallback):
    """Write last.ckpt before the first step, every `save_every` steps, at a signal, at the end."""

    def __init__(self, run: Run, save_every: int, stop: StopSignal, clock: Clock):
        self.run, self.save_every, self.stop, self.clock = run, save_every, stop, clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._save(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        step = trainer.global_step
        stopping = self.stop.agreed()
        if stopping or step % self.save_every == 0 or step == trainer.max_steps:
            self._save(trainer, pl_module)
        trainer.should_stop = stopping

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Weights that the last update broke never replace good ones."""
        with self.clock.paused():
            parameters = list(pl_module.named_parameters())
            broken = [not torch.isfinite(local(weight)).all() for _, weight in parameters]
            first = ranks.largest(len(broken) - broken.index(True) if any(broken) else 0)
            if first:
                name = parameters[len(broken) - first][0]
                raise NonFiniteTraining(
                    f"step {trainer.global_step}: {name} is not finite after the update"
                )
            trainer.save_checkpoint(self.run.last)
