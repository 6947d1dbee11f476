"""Validation during training: the same `evaluate` that `eval` runs, and best.ckpt."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from nano_moe import ranks
from nano_moe.evaluation import Evaluation, evaluate
from nano_moe.runs import Run
from nano_moe.text.store import Corpus
from nano_moe.training.clock import Clock
from nano_moe.training.logbook import routing_images
from nano_moe.training.module import NonFiniteTraining
from nano_moe.training.step_callback import StepCallback
from nano_moe.training.telemetry import Recorder, budget


class Validation(StepCallback):
    """Scores the whole validation split every `val_every` steps and after the last one.

    Not Lightning's validation loop: a checkpoint of the same step is then always written after
    its validation, so a resumed run repeats no figure and misses none.
    """

    def __init__(self, run: Run, corpus: Corpus, recorder: Recorder, clock: Clock, precision: str):
        self.run, self.corpus, self.recorder = run, corpus, recorder
        self.clock, self.precision = clock, precision
        self.best_ce = math.inf
        self.latest: Evaluation | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_ce": self.best_ce}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_ce = state_dict["best_ce"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Imported weights and those of another run are scored before they move, once."""
        moe = pl_module.recipe.model.moe
        begins = trainer.global_step == 0 and self.best_ce == math.inf
        upcycled = moe is not None and moe.init_from is not None
        if begins and (upcycled or self.run.is_untrained_import):
            with self.clock.paused():
                self._validate(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        step, recipe = trainer.global_step, pl_module.recipe
        if not recipe.model.is_causal:
            return  # such a loss would mean nothing
        if step % recipe.trainer.val_every == 0 or step == trainer.max_steps:
            with self.clock.paused():
                self._validate(trainer, pl_module)

    def _validate(self, trainer: L.Trainer, pl_module: Any) -> None:
        recipe, step = pl_module.recipe, trainer.global_step
        scored = evaluate(
            pl_module.model,
            self.corpus,
            batch_size=recipe.trainer.batch_size // ranks.count(),
            precision=self.precision,
        )
        row = budget(
            step, recipe.tokens_per_step, pl_module.train_flops_per_token, self.clock.read()
        )
        figures = {"val/ce": scored.overall.ce, "val/bpb": scored.overall.bpb}
        domains = {f"val_bpb/{name}": score.bpb for name, score in scored.domains.items()}
        if scored.routing:
            domains["val/max_vio"] = max(layer["max_vio"] for layer in scored.routing)
        images = routing_images(scored.routing, self.corpus.domains)
        self.recorder.write(step, {**row, **figures}, {**figures, **domains}, images)
        self.latest = scored
        if not math.isfinite(scored.overall.ce):
            raise NonFiniteTraining(f"step {step}: validation loss is {scored.overall.ce:g}")
        if scored.overall.ce < self.best_ce:
            self.best_ce = scored.overall.ce
            trainer.save_checkpoint(self.run.best)
