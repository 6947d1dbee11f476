"""What a run writes about itself: metrics.csv and TensorBoard events under one tag scheme.

    train/ce, train/loss      cross-entropy; what is minimized, weighted terms included
    train/<term>              load_balancing_loss (1: even), router_z_loss; raw, mean over layers
    train/weighted/<term>     the same as it enters the loss: times its coefficient, over all layers
    train/dropped_share       assignments over capacity, mean over layers
    val/ce, val/bpb           overall; val_bpb/<domain> per domain
    moe/layer<l>/<figure>     max_vio, load_entropy, max_share, dead_experts, router_entropy,
                              dropped_share, bias_spread and the raw terms of one layer
    moe_load/layer<l>/<e>     share of assignments that expert e took
    by_<budget>/<loss>        train_ce and val_ce, the step being tokens, megaflops, milliseconds
    val/max_vio               of the worst layer over the validation split
    optim/lr/<group>, grad_norm/<part>, speed/tokens_per_second, speed/mfu

Texts, HParams, layouts and images: `logbook.py`.

Shapes: L sparse layers, E experts.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from nano_moe import ranks
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.files import write_text
from nano_moe.model.balance import load_statistics
from nano_moe.runs import Run
from nano_moe.training.clock import Clock
from nano_moe.training.logbook import by_budget, describe_run
from nano_moe.training.step_callback import StepCallback

COLUMNS = (
    "step",
    "tokens",
    "flops",
    "seconds",
    "train/ce",
    "train/load_balancing_loss",
    "train/router_z_loss",
    "val/ce",
    "val/bpb",
)
SCALARS = {
    "total_loss": "train/loss",
    "ce": "train/ce",
    "load_balancing_loss": "train/load_balancing_loss",
    "router_z_loss": "train/router_z_loss",
    "weighted_load_balancing_loss": "train/weighted/load_balancing_loss",
    "weighted_router_z_loss": "train/weighted/router_z_loss",
    "dropped_share": "train/dropped_share",
}
PER_LAYER = ("router_entropy", "load_balancing_loss", "router_z_loss", "dropped_share")
# Dense bf16 peak in FLOP/s from the makers' data sheets, by whole words of the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Recorder:
    """Rows of figures to metrics.csv and, tag by tag, to TensorBoard."""

    def __init__(self, run: Run, resumed_at: int | None):
        self.path = run.metrics_file
        if resumed_at is None:
            write_text(self.path, ",".join(COLUMNS) + "\n")
        else:
            _drop_rows_after(self.path, resumed_at)
        purge = None if resumed_at is None else resumed_at + 1
        self.events = SummaryWriter(log_dir=str(run.path), purge_step=purge)
        if purge is None:
            describe_run(self.events, run)
        else:
            self._write_again(purge)

    def write(
        self,
        step: int,
        row: dict[str, float],
        scalars: dict[str, float],
        images: dict[str, np.ndarray] | None = None,
    ) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow({"step": step, **row})
        for tag, value in scalars.items():
            self.events.add_scalar(tag, value, step)
        for tag, value, place in by_budget(row):
            self.events.add_scalar(tag, value, place)
        for tag, image in (images or {}).items():
            self.events.add_image(tag, image, step, dataformats="HWC")

    def _write_again(self, purge: int) -> None:
        """What the purge has hidden although it came before: places are larger than steps."""
        with open(self.path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                figures = {name: float(value) for name, value in row.items() if value}
                for tag, value, place in by_budget(figures):
                    if place >= purge:
                        self.events.add_scalar(tag, value, place)

    def close(self) -> None:
        self.events.close()


class NoRecorder(Recorder):
    """Of the processes that do not write."""

    def __init__(self) -> None:
        pass

    def write(self, *figures: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _drop_rows_after(path: Path, step: int) -> None:
    """Rows past the checkpoint are written anew; a row cut short by a crash goes too."""
    if not path.is_file():
        write_text(path, ",".join(COLUMNS) + "\n")
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines[:1] != [",".join(COLUMNS)]:
        raise UserError(f"{path}: not this version's columns; move it aside, then resume")
    whole = [line for line in lines[1:] if line.count(",") == len(COLUMNS) - 1]
    kept = [line for line in whole if line.split(",")[0].isdigit()]
    kept = [line for line in kept if int(line.split(",")[0]) <= step]
    write_text(path, "\n".join([",".join(COLUMNS), *kept]) + "\n")


class Telemetry(StepCallback):
    """Averages step outputs between rows and records them every `log_every` steps."""

    def __init__(self, recorder: Recorder, clock: Clock, recipe: Recipe, precision: str):
        self.recorder, self.clock, self.precision = recorder, clock, precision
        self.log_every = recipe.trainer.log_every
        self.tokens_per_step = recipe.tokens_per_step
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._row_seconds, self._row_step = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Sums of an unfinished interval included, so that a resumed row equals a whole one."""
        return {
            "sums": self._sums,
            "batches": self._batches,
            "seconds": self.clock.read(),
            "row_seconds": self._row_seconds,
            "row_step": self._row_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._batches = state_dict["sums"], state_dict["batches"]
        self._row_seconds, self._row_step = state_dict["row_seconds"], state_dict["row_step"]
        self.clock.set(state_dict["seconds"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.start()

    def on_micro_batch_end(self, outputs: Any) -> None:
        for name, value in outputs.items():
            total = value.detach().double() if value.is_floating_point() else value.detach()
            held = self._sums.get(name)
            self._sums[name] = total if held is None else held.to(total.device) + total
        self._batches += 1

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        step = trainer.global_step
        if step % self.log_every == 0 or step == trainer.max_steps:
            self._record(step, pl_module)

    def _record(self, step: int, pl_module: Any) -> None:
        seconds = self.clock.read()
        scalars = {
            tag: (self._sums[name] / self._batches).mean().item()
            for name, tag in SCALARS.items()
            if name in self._sums
        }
        scalars |= self._routing_scalars(pl_module.layers)
        scalars |= bias_spreads(pl_module)
        scalars |= self._speed_scalars(step, seconds, pl_module)
        scalars |= {f"grad_norm/{k}": v.item() for k, v in pl_module.gradient_norms.items()}
        scalars |= {f"optim/lr/{k}": rate for k, rate in pl_module.learning_rates.items()}
        row = budget(step, self.tokens_per_step, pl_module.train_flops_per_token, seconds)
        row |= {tag: value for tag, value in scalars.items() if tag in COLUMNS}
        self.recorder.write(step, row, scalars)
        self._sums, self._batches = {}, 0
        self._row_seconds, self._row_step = seconds, step

    def _routing_scalars(self, layers: list[int]) -> dict[str, float]:
        if "counts" not in self._sums:
            return {}
        counts = self._sums["counts"]
        figures = load_statistics(counts)
        held = [name for name in PER_LAYER if name in self._sums]
        figures |= {name: self._sums[name] / self._batches for name in held}
        shares = counts / counts.sum(-1, keepdim=True)
        scalars: dict[str, float] = {}
        for row, layer in enumerate(layers):
            for name, values in figures.items():
                scalars[f"moe/layer{layer}/{name}"] = values[row].item()
            for expert, share in enumerate(shares[row].tolist()):
                scalars[f"moe_load/layer{layer}/{expert}"] = share
        return scalars

    def _speed_scalars(self, step: int, seconds: float, pl_module: Any) -> dict[str, float]:
        elapsed = seconds - self._row_seconds
        if elapsed <= 0:
            return {}
        rate = (step - self._row_step) * self.tokens_per_step / elapsed
        peak = peak_flops(pl_module.device) if self.precision == "bf16" else None
        flops = rate * pl_module.train_flops_per_token / ranks.count()
        mfu = {} if peak is None else {"speed/mfu": flops / peak}
        return {"speed/tokens_per_second": rate, **mfu}


def bias_spreads(pl_module: Any) -> dict[str, float]:
    """Largest minus smallest selection bias of each layer that has one."""
    routers = zip(pl_module.layers, pl_module.model.routers, strict=True)
    return {
        f"moe/layer{layer}/bias_spread": (
            router.expert_bias.max() - router.expert_bias.min()
        ).item()
        for layer, router in routers
        if router.expert_bias is not None
    }


def budget(step: int, tokens_per_step: int, flops: int, seconds: float) -> dict[str, float]:
    """Tokens, training FLOPs and seconds spent by the end of a step."""
    tokens = step * tokens_per_step
    return {"tokens": tokens, "flops": tokens * flops, "seconds": round(seconds, 3)}


def peak_flops(device: torch.device) -> float | None:
    """Peak of this device in FLOP/s where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)
