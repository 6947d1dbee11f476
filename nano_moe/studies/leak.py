"""What a model takes from text that comes after the token it predicts.

Three readings of the validation split, in batches as large as training's:
- `ce_whole`: all at once, as training sees it. Where experts choose, a token's experts depend on
  the tokens after it, so this is no loss of a language model.
- `ce_own_future`, `ce_other_future`: of the first half of each window, once before its own second
  half and once before another window's (the shuffled control of Wang et al. 2024, app. D, turned
  on the evaluation). A causal model has the same loss to the bit.
- `ce_prefix`: every token from what stands before it alone, as decoding would; of one window in
  ten, as each of their tokens takes a forward pass. A causal model sees nothing else anyway.

Shapes: B windows of a batch, T time, M windows in all.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from nano_moe.checkpoints import load_model
from nano_moe.device import choose_precision
from nano_moe.evaluation import autocast, spread_windows
from nano_moe.model.gpt import GPT
from nano_moe.model.loss import cross_entropy
from nano_moe.runs import Run
from nano_moe.text.store import Corpus

# Few windows say little: one that ends in a long line of "#" differed by 9 nats between two seeds.
EVERY = 10  # windows, of which one is read by prefixes


def look(run: Run, corpus: Corpus) -> dict[str, Any]:
    """The four losses in nats per token."""
    recipe, model, _ = load_model(run)
    context = recipe.model.context
    inputs, targets, _ = spread_windows(corpus, context, len(corpus.val) // context)
    with autocast(inputs.device, choose_precision(recipe)):
        figures = losses(model, inputs, targets, recipe.trainer.batch_size)
        some = inputs[::EVERY], targets[::EVERY]
        if recipe.model.is_causal:
            figures["ce_prefix"] = _read(model, *some, recipe.trainer.batch_size).mean().item()
        else:
            figures["ce_prefix"] = prefix_loss(model, *some)
    return {"figures": figures, "details": {"windows": len(inputs)}}


def losses(model: GPT, inputs: Tensor, targets: Tensor, rows: int) -> dict[str, float]:
    """What is read in batches of `rows`, by name, of (M, T) windows; the model is in eval mode."""
    half = inputs.shape[1] // 2
    mixed = torch.cat([inputs[:, :half], inputs.roll(1, 0)[:, half:]], 1)  # (M, T)
    whole, other = (_read(model, each, targets, rows) for each in (inputs, mixed))  # (M, T)
    return {
        "ce_whole": whole.mean().item(),
        "ce_own_future": whole[:, :half].mean().item(),
        "ce_other_future": other[:, :half].mean().item(),
    }


@torch.no_grad()
def _read(model: GPT, inputs: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Every token's loss, (M, T), of windows in batches of `rows`."""
    pairs = zip(inputs.split(rows), targets.split(rows), strict=True)
    return torch.cat([_losses(model, *pair) for pair in pairs])


def _losses(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:  # (B, T), (B, T) -> (B, T)
    logits, _ = model(inputs)
    return cross_entropy(logits, targets, reduction="none").view(targets.shape)


@torch.no_grad()
def prefix_loss(model: GPT, inputs: Tensor, targets: Tensor) -> float:
    """Mean over windows (M, T); each prefix runs alone, its experts choose among it."""
    found = []
    for window, wanted in zip(inputs, targets, strict=True):
        for end in range(1, len(window) + 1):
            losses = _losses(model, window[None, :end], wanted[None, :end])
            found.append(losses[0, -1].item())
    return statistics.fmean(found)
