"""Checkpoint files that are whole or absent, and when they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import CheckpointIO

from nano_moe.errors import UserError
from nano_moe.runs import Run, read_checkpoint
from nano_moe.training.clock import Clock
from nano_moe.training.signals import StopSignal
from nano_moe.training.step_callback import StepCallback


class AtomicCheckpointIO(CheckpointIO):
    """Write a temporary file in the same folder, fsync, rename; read with weights_only=True."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"{path}: could not be written ({reason}); the one before it is untouched, "
                "free some space and resume"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SaveLast(StepCallback):
    """Write last.ckpt before the first step, every `save_every` steps, at a signal, at the end."""

    def __init__(self, run: Run, save_every: int, stop: StopSignal, clock: Clock):
        self.run, self.save_every, self.stop, self.clock = run, save_every, stop, clock
        self._saved_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_new(trainer)

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        step = trainer.global_step
        stopping = self.stop.received
        if stopping or step % self.save_every == 0 or step == trainer.max_steps:
            self._save_if_new(trainer)
        trainer.should_stop = stopping

    def _save_if_new(self, trainer: L.Trainer) -> None:
        if trainer.global_step != self._saved_at:
            with self.clock.paused():
                trainer.save_checkpoint(self.run.last)
            self._saved_at = trainer.global_step
