"""One line when a router goes wrong: the mean balancing loss hardly shows it, a layer's load does.

Shapes: L sparse layers, E experts, K top_k.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from nano_moe.training.step_callback import StepCallback

CROWDED = 0.6  # share of tokens that visit one expert


class LoadAlarm(StepCallback):
    """Warns, once per layer and kind, of an expert that most tokens visit or that none does.

    Over `every` steps, of which none is missing. `worst_share` is the last step's largest share of
    tokens on one expert.
    """

    def __init__(self, top_k: int, every: int, enabled: bool):
        self.top_k, self.every, self.enabled = top_k, every, enabled
        self.worst_share: float | None = None
        self._counts: Tensor | None = None  # (L, E), of this step so far
        self._seen: Tensor | None = None  # (L, E), of `_steps` steps since the last look
        self._steps = 0
        self._told: set[tuple[int, str]] = set()

    def on_micro_batch_end(self, outputs: Any) -> None:
        counts = outputs.get("counts")
        if counts is None or not self.enabled:
            return
        self._counts = counts if self._counts is None else self._counts + counts

    def on_step_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        if self._counts is None:
            return
        counts, self._counts = self._counts, None
        share = (counts.amax(-1) / counts.sum(-1)).max().item()
        self.worst_share = min(1.0, share * self.top_k)
        self._seen = counts if self._seen is None else self._seen + counts
        self._steps += 1
        if trainer.global_step % self.every == 0:
            if self._steps == self.every:  # fewer after a stop
                for line in self.faults(self._seen, pl_module.layers):
                    tqdm.write(f"WARNING: step {trainer.global_step}: {line}", file=sys.stderr)
            self._seen, self._steps = None, 0

    def faults(self, counts: Tensor, layers: list[int]) -> list[str]:
        """What is new in (L, E) counts of several steps."""
        share = self.top_k * counts / counts.sum(-1, keepdim=True).clamp_min(1)
        even = self.top_k / counts.shape[-1]
        found = []
        for row, layer in enumerate(layers):
            dead = torch.nonzero(counts[row] == 0).flatten().tolist()
            if dead and self._is_new(layer, "dead"):
                who = f"expert{'s' if dead[1:] else ''} {', '.join(map(str, dead))}"
                found.append(f"layer {layer}: {who} got no token for {self.every} steps")
            most, expert = share[row].max().item(), int(share[row].argmax())
            if most > max(CROWDED, 2 * even) and self._is_new(layer, "crowded"):
                found.append(f"layer {layer}: {most:.0%} of the tokens go to expert {expert}")
        return found

    def _is_new(self, layer: int, kind: str) -> bool:
        known = (layer, kind) in self._told
        self._told.add((layer, kind))
        return not known
