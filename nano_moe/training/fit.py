"""Train a recipe into a run folder, or go on where its last.ckpt or imported weights stand."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from nano_moe import ranks
from nano_moe.checkpoints import newest, read_checkpoint
from nano_moe.config import Recipe
from nano_moe.device import choose_device, choose_devices, choose_precision, count_processes
from nano_moe.errors import UserError
from nano_moe.evaluation import Evaluation
from nano_moe.files import remove_torn
from nano_moe.footprint import peak
from nano_moe.memory import keep_freed_memory, return_freed_memory
from nano_moe.runs import Run, check_corpus, check_recipe, describe, training, write_json
from nano_moe.text.store import Corpus
from nano_moe.training.alarm import LoadAlarm
from nano_moe.training.checkpoint import AtomicCheckpointIO, SaveLast
from nano_moe.training.clock import Clock
from nano_moe.training.data import TokenData
from nano_moe.training.layouts import strategy_of
from nano_moe.training.module import Decoder, NonFiniteTraining
from nano_moe.training.nonfinite import report_nonfinite
from nano_moe.training.processes import environment
from nano_moe.training.progress import Progress
from nano_moe.training.signals import StopSignal
from nano_moe.training.spikes import SpikeAlarm
from nano_moe.training.telemetry import NoRecorder, Recorder, Telemetry
from nano_moe.training.validation import Validation
from nano_moe.training.warm_start import warm_start

log = logging.getLogger("nano_moe")

LARGE = 500 * 10**6  # bytes of a step from which on they matter more than page faults

Watcher = Callable[[Clock], L.Callback]


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    step: int
    seconds: float  # of training alone
    evaluation: Evaluation | None  # of the last step; None when stopped before it, or not causal
    stopped_by: str | None  # the signal's name, None when all steps were done


def fit(
    run: Run,
    recipe: Recipe,
    corpus: Corpus,
    *,
    resume: bool = False,
    progress: bool = True,
    watchers: Sequence[Watcher] = (),
) -> Result:
    """Train to the recipe's last step; raises UserError on bad input and on non-finite loss.

    And where another process trains this run. To `resume` a run of imported weights alone is to
    train these from step 0. `watchers` make callbacks that come after all of the training's own,
    given its clock, which they stop while they do what is not training.
    """
    with training(run) if ranks.leads() else nullcontext():
        return _fit(run, recipe, corpus, resume, progress, watchers)


def _fit(
    run: Run,
    recipe: Recipe,
    corpus: Corpus,
    resume: bool,
    progress: bool,
    watchers: Sequence[Watcher],
) -> Result:
    device, precision = choose_device(recipe), choose_precision(recipe)
    check_started(recipe)
    source, start = prepare_run(run, recipe, corpus, device, resume=resume)
    ranks.meet()  # what the first wrote can be read
    _quiet()
    if device.type == "cpu":
        large = peak(recipe, precision).bytes >= LARGE
        return_freed_memory() if large else keep_freed_memory()
    clock, stop = Clock(), StopSignal()
    recorder = Recorder(run, start) if ranks.leads() else NoRecorder()
    progress = progress and ranks.leads()
    telemetry = Telemetry(recorder, clock, recipe, precision)
    validation = Validation(run, corpus, recorder, clock, precision)
    top_k = 0 if recipe.model.moe is None else recipe.model.moe.top_k
    alarm = LoadAlarm(top_k, recipe.trainer.log_every, progress)
    spikes = SpikeAlarm(recipe.trainer.log_every, recipe.optim.grad_clip, progress)
    bar = Progress(recipe.tokens_per_step, clock, validation, alarm, progress)
    save = SaveLast(run, recipe.trainer.save_every, stop, clock)
    callbacks: list[L.Callback] = [stop, telemetry, validation, alarm, spikes, bar, save]
    callbacks += [make(clock) for make in watchers]
    trainer = _trainer(recipe, device, precision, callbacks)
    # A resumed run's state comes from its checkpoint.
    torch.manual_seed(recipe.seed + ranks.rank())
    module = Decoder(recipe)
    if source is None:
        warm_start(module.model, recipe, run)
    if recipe.trainer.compile:
        check_compiler(device)
        module.model.compile()
    try:
        data = TokenData(corpus, recipe)
        trainer.fit(module, data, ckpt_path=source)
    except NonFiniteTraining as error:
        raise report_nonfinite(error, run, module) from error
    except SystemExit as error:  # what the trainer makes of a second Ctrl-C
        raise KeyboardInterrupt from error
    finally:
        recorder.close()
    name = None if stop.signal is None else stop.signal.name
    finished = trainer.global_step >= recipe.trainer.steps
    return Result(
        step=trainer.global_step,
        seconds=clock.read(),
        evaluation=validation.latest if finished else None,
        stopped_by=None if finished else name,
    )


def prepare_run(
    run: Run, recipe: Recipe, corpus: Corpus, device: torch.device, *, resume: bool
) -> tuple[str | None, int | None]:
    """Write what describes a new run, or check what is resumed.

    Its checkpoint and step, None for a new run and for imported weights that begin as one.
    """
    if resume and not run.is_untrained_import:
        return _check_begun(run, recipe, corpus)
    imported = _check_import(run, recipe, corpus) if resume else {}
    if ranks.leads():
        corpus.tokenizer.save(run.tokenizer_file)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        write_json(run.manifest_file, describe(recipe, corpus=corpus, device=name) | imported)
    return None, None


def _check_begun(run: Run, recipe: Recipe, corpus: Corpus) -> tuple[str, int]:
    check_corpus(run, corpus)
    if ranks.leads():
        remove_torn(run.path)
    path, checkpoint, warning = newest(run)
    check_recipe(run, recipe, checkpoint)
    if warning is not None and ranks.leads():
        log.warning(warning)
    return str(path), int(checkpoint["global_step"])


def _check_import(run: Run, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """What the run's manifest is to keep of where its weights are from."""
    check_corpus(run, corpus)
    checkpoint = read_checkpoint(run.best)
    check_recipe(run, recipe, checkpoint)
    if "loops" in checkpoint and checkpoint["global_step"] > 0:
        raise UserError(
            f"{run.best}: was trained to step {checkpoint['global_step']} already, and no "
            f"{run.last.name} is left to go on from; import the folder anew"
        )
    return {"imported": run.manifest()["imported"]}


def check_started(recipe: Recipe) -> None:
    """Raises UserError where the recipe's processes are not in touch."""
    n = count_processes(recipe) if recipe.trainer.is_parallel else 1
    if ranks.count() != n or recipe.trainer.is_parallel != dist.is_initialized():
        raise UserError(
            f"trainer.devices: {n} processes, and only `train` and `resume` start them; set it "
            "to 1, and trainer.strategy to auto"
        )


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would find no C++ compiler for CPU code."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise UserError("trainer.compile: needs g++ or clang++, and none is found; set it to false")


def _trainer(
    recipe: Recipe, device: torch.device, precision: str, callbacks: list[L.Callback]
) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=choose_devices(recipe),
        num_nodes=recipe.trainer.nodes,
        strategy=strategy_of(recipe),
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=recipe.trainer.steps,
        max_epochs=-1,
        accumulate_grad_batches=recipe.trainer.accumulate,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *([environment()] if recipe.trainer.is_parallel else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _quiet() -> None:
    """Our own output says what the trainer's notes would."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*is not resumable.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", text)
