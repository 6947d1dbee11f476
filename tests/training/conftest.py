"""A tiny recipe over a tiny file, trained in a folder of its own, stopped by real signals."""

import csv
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import ended, fork

from nano_moe import runs
from nano_moe.config import Recipe
from nano_moe.text.store import prepare
from nano_moe.training.fit import fit
from nano_moe.training.module import Decoder

KINDS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "softmax": {
        "n_experts": 4,
        "top_k": 2,
        "load_balancing_loss": 0.01,
        "router_z_loss": 0.001,
    },
    "sigmoid": {
        "n_experts": 4,
        "top_k": 2,
        "n_shared_experts": 2,
        "score": "sigmoid",
        "bias_update_rate": 0.01,
        "first_k_dense": 1,
    },
    "schemes": {  # what draws, drops, looks back and sums over a step
        "n_experts": 4,
        "top_k": 2,
        "noisy_top_k": True,
        "router_jitter": 0.1,
        "capacity_factor": 1.0,
        "router_window": 2,
        "per_expert_scale": True,
        "load_balancing_loss": 0.01,
        "balance_scope": "global_batch",
    },
    "hash": {"n_experts": 4, "top_k": 2, "routing": "hash"},
    "experts choose": {"n_experts": 4, "top_k": 2, "routing": "expert_choice"},
}
CLOCK = {"seconds", "row_seconds"}


class Workshop:
    """Makes recipes over `text.txt` of the working folder and trains them under `checkpoints`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.batches: list[torch.Tensor] = []  # every micro-batch that was trained on

    def recipe(self, kind: str = "dense", **overrides: Any) -> Recipe:
        """Ten steps of 4 x 16 bytes; `section__field=value` changes a field."""
        sections: dict[str, Any] = {
            "seed": 5,
            "model": {
                "vocab_size": 264,
                "context": 16,
                "n_layers": 2,
                "d_model": 32,
                "n_heads": 2,
                "n_kv_heads": 1,
                "d_ff": 64,
                "qk_norm": True,
                "moe": KINDS[kind],
            },
            "data": {
                "files": ["text.txt"],
                "tokenizer": "byte",
                "cache": "cache",
                "val_fraction": 0.2,
            },
            "optim": {"lr": 0.01, "newton_schulz": "fp32"},
            "trainer": {
                "steps": 10,
                "batch_size": 4,
                "precision": "fp32",
                "accelerator": "cpu",
                "val_every": 4,
                "save_every": 3,
                "log_every": 2,
            },
        }
        for key, value in overrides.items():
            *section, field = key.split("__")
            (sections[section[0]] if section else sections)[field] = value
        return Recipe.model_validate(sections)

    def corpus(self, recipe: Recipe):
        return prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)

    def train(self, recipe: Recipe, name: str = "run"):
        """(run, result) of a new run."""
        run = runs.create(recipe, stem="tiny", name=name)
        return run, fit(run, recipe, self.corpus(recipe), progress=False)

    def resume(self, run: runs.Run):
        recipe = run.recipe()
        return fit(run, recipe, self.corpus(recipe), resume=True, progress=False)

    def during(self, step: int, act, *, micro_batch: int = 0) -> None:
        """Call `act` in the middle of optimizer step `step` (from 1), once."""
        original = Decoder.training_step
        done = []

        def training_step(module: Decoder, batch: torch.Tensor, batch_idx: int):
            output = original(module, batch, batch_idx)
            accumulate = module.recipe.trainer.accumulate
            here = module.global_step == step - 1 and batch_idx % accumulate == micro_batch
            if here and not done:
                done.append(step)
                act()
            return output

        self.monkeypatch.setattr(Decoder, "training_step", training_step)

    def signal_at(self, step: int, number: int = signal.SIGTERM, micro_batch: int = 0) -> None:
        self.during(step, lambda: os.kill(os.getpid(), number), micro_batch=micro_batch)

    def observe(self) -> None:
        """Keep every micro-batch in `batches`."""
        original = Decoder.training_step

        def training_step(module: Decoder, batch: torch.Tensor, batch_idx: int):
            self.batches.append(batch.clone())
            return original(module, batch, batch_idx)

        self.monkeypatch.setattr(Decoder, "training_step", training_step)

    def seen(self) -> list[torch.Tensor]:
        """What was observed since the last call."""
        batches, self.batches = self.batches, []
        return batches

    @staticmethod
    def in_child(work) -> int:
        """Run `work` in a forked process; its exit status, or minus the signal that ended it."""
        return ended(fork(work))

    @staticmethod
    def checkpoint(path: Path) -> dict[str, Any]:
        return torch.load(path, weights_only=True)

    @staticmethod
    def rows(run: runs.Run) -> list[dict[str, str]]:
        """metrics.csv without the clock, which no two runs share."""
        with open(run.metrics_file, newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    @classmethod
    def differences(cls, a: Any, b: Any, path: str = "") -> list[str]:
        """Paths at which two checkpoints are not bitwise equal, clocks left out."""
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            inner = [cls.differences(a[k], b[k], f"{path}.{k}") for k in a if k not in CLOCK]
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            inner = [cls.differences(a[i], b[i], f"{path}[{i}]") for i in range(len(a))]
        elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
        else:
            return [] if a == b else [f"{path}: {a!r} or {b!r}"]
        return [fault for faults in inner for fault in faults]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Works in `tmp_path`, on one thread so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    words = "the old fox saw a hen and ran to the river where stones lie in the sun".split()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(20)]
    Path("text.txt").write_text("\n".join(lines) + "\n")  # 37 windows of 16 an epoch
    yield Workshop(monkeypatch)
    torch.set_num_threads(threads)
