"""Tiny trainings that one process and several must take to the same weights."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nano_moe import checkpoints, runs
from nano_moe.config import Recipe
from nano_moe.text.store import Corpus, prepare
from nano_moe.training import layouts
from nano_moe.training.fit import fit
from nano_moe.training.module import Decoder

STEPS, HALF = 20, 10
# What is summed over ranks is in one or the other: both scopes of the balancing loss, the z-loss,
# the bias; accumulation; both optimizers. With 16 experts, top_k 1 and 32 tokens some expert is
# idle in every step. Rows of 18 do not split evenly over 4 ranks.
CASES: dict[str, dict[str, Any]] = {
    "muon": {
        "moe": {
            "n_experts": 4,
            "top_k": 2,
            "n_shared_experts": 1,
            "load_balancing_loss": 0.1,
            "balance_scope": "global_batch",
            "router_z_loss": 0.01,
            "capacity_factor": 1.25,
        },
        "trainer": {"accumulate": 2, "activation_checkpointing": True},
    },
    "adamw": {
        "moe": {
            "n_experts": 16,
            "top_k": 1,
            "score": "sigmoid",
            "load_balancing_loss": 0.1,
            "bias_update_rate": 0.01,
            "per_expert_scale": True,
        },
        "optim": {"name": "adamw"},
    },
    "idle muon": {
        "moe": {
            "n_experts": 16,
            "top_k": 1,
            "load_balancing_loss": 0.1,
            "balance_scope": "sequence",
        },
    },
    "dense": {"moe": None, "optim": {"expert_lr": None}},
    "noise": {"moe": {"n_experts": 4, "top_k": 2, "noisy_top_k": True, "router_jitter": 0.1}},
}


def recipe(name: str, backend: str = "loop", **trainer: Any) -> Recipe:
    case = CASES[name]
    moe = case["moe"] and {**case["moe"], "d_expert": 8, "first_k_dense": 1, "backend": backend}
    return Recipe.model_validate(
        {
            "seed": 3,
            "model": {
                "vocab_size": 264,
                "context": 8,
                "n_layers": 2,
                "d_model": 18,
                "n_heads": 3,
                "head_dim": 6,
                "d_ff": 24,
                "init_std": 0.2,
                "moe": moe,
            },
            "data": {
                "files": ["text.txt"],
                "tokenizer": "byte",
                "cache": "cache",
                "val_fraction": 0.2,
            },
            "optim": {
                "lr": 0.02,
                "newton_schulz": "fp32",
                "expert_lr": 0.01,
                **case.get("optim", {}),
            },
            "trainer": {
                "steps": STEPS,
                "batch_size": 4,
                "precision": "fp32",
                "accelerator": "cpu",
                "val_every": 10,
                "save_every": 10,
                "log_every": 1,
                **case.get("trainer", {}),
                **trainer,
            },
        }
    )


def folder_of(job: str) -> str:
    """The name of a job's run."""
    return job.replace(":", "-").replace(" ", "_")


def write_text(path: Path) -> None:
    words = "the old fox saw a hen and ran to the river where stones lie in the sun".split()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(20)]
    path.write_text("\n".join(lines) + "\n")


def corpus(of: Recipe) -> Corpus:
    return prepare(of.data, of.model.vocab_size, of.model.context, progress=False)


def train(of: Recipe, name: str) -> runs.Run:
    """A run of this name in the working folder, on the processes that call."""
    run = runs.Run(runs.ROOT / name)
    if layouts.ranks.leads():
        run = runs.create(of, stem="tiny", name=name)
    layouts.ranks.meet()
    fit(run, of, corpus(of), progress=False)
    return run


def train_half(of: Recipe, name: str) -> None:
    """Of the first steps alone, in float64."""
    with in_float64(), stopped_after(HALF):
        run = train(of, name)
    if layouts.ranks.leads():  # else what goes on from it would have nothing left to do
        assert checkpoints.read_checkpoint(run.last)["global_step"] == HALF


def overrides(trainer: dict[str, Any]) -> list[str]:
    """From any layout to that of these fields."""
    fields = {"devices": 1, "strategy": "auto", "expert_ranks": None, **trainer}
    return [f"trainer.{field}={json.dumps(value)}" for field, value in fields.items()]


def resume(name: str, changes: list[str]) -> None:
    run = runs.find(name)
    of = run.recipe(changes)
    fit(run, of, corpus(of), resume=True, progress=False)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    original = Decoder.__init__

    def init(self: Decoder, of: Recipe) -> None:
        original(self, of)
        self.double()

    Decoder.__init__ = init
    try:
        yield
    finally:
        Decoder.__init__ = original


@contextlib.contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """As a signal would: after that step's checkpoint."""
    original = Decoder.on_train_batch_end

    def stop(self: Decoder, *arguments: Any) -> None:
        if self.global_step == steps:
            self.trainer.should_stop = True

    Decoder.on_train_batch_end = stop
    try:
        yield
    finally:
        Decoder.on_train_batch_end = original


@contextlib.contextmanager
def first_gradients() -> Iterator[dict[str, torch.Tensor]]:
    """Filled with every parameter's whole gradient of the first optimizer step."""
    found: dict[str, torch.Tensor] = {}
    original = Decoder.configure_gradient_clipping

    def keep(self: Decoder, *arguments: Any, **named: Any) -> None:
        groups = layouts.shared_by(self.model)
        for name, parameter in self.model.named_parameters():
            if self.global_step == 0:
                grad = layouts.full(parameter.grad, groups.get(id(parameter)))
                found[name] = grad.clone()
        original(self, *arguments, **named)

    Decoder.configure_gradient_clipping = keep
    try:
        yield found
    finally:
        Decoder.configure_gradient_clipping = original
