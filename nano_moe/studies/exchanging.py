"""Experts shared out over processes: what they exchange and how long that takes.

Shapes: W windows of T tokens, R ranks.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from nano_moe.bench.comm import bytes_per_token, measure
from nano_moe.checkpoints import load_model
from nano_moe.communication import ranks_needed, sent
from nano_moe.config import Recipe
from nano_moe.device import choose_precision
from nano_moe.evaluation import spread_windows
from nano_moe.model.expert_parallel import pack
from nano_moe.runs import Run
from nano_moe.text.store import Corpus

STEPS = 8
RANKS = 4  # that a look supposes
WINDOWS = 32  # spread over the validation split


def exchange(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Bytes per token and sparse layer, and milliseconds of a step in the exchange and outside.

    Of weights as drawn. Of each step the rank counts that was in the exchange for the shortest
    time: what the others had beyond that, they spent waiting for it.
    """
    (found,) = measure([recipe], ranks, STEPS)
    steps = list(zip(*found, strict=True))
    exchanged = [min(rank.exchange_seconds for rank in step) for step in steps]
    whole = [statistics.fmean(rank.seconds for rank in step) for step in steps]
    tokens = recipe.trainer.batch_size * recipe.model.context
    rest = [total - part for total, part in zip(whole, exchanged, strict=True)]
    return {
        "exchange_bytes": sum(bytes_per_token(recipe, found)),
        "formula_bytes": sent(recipe.model, ranks, choose_precision(recipe), tokens).bytes,
        "exchange_ms": 1e3 * statistics.median(exchanged),
        "rest_ms": 1e3 * statistics.median(rest),
        "step_ms": 1e3 * statistics.median(whole),
    }


@torch.no_grad()
def look(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Other ranks that a token of validation text would go to, of four, mean of the layers.

    `chance_copies`: where the router prefers no expert. No rank is started for this: it is counted
    from the choices, a token being as likely at home on any rank.
    """
    moe = run.recipe().model.moe
    assert moe is not None
    _, model, _ = load_model(run)
    windows, _, _ = spread_windows(corpus, run.recipe().model.context, WINDOWS)
    away = (RANKS - 1) / RANKS
    layers = [
        away * len(pack(routing, RANKS).token) / len(routing.ids)
        for routing in model(windows)[1]
        if routing is not None
    ]
    figures = {
        "copies": statistics.fmean(layers),
        "chance_copies": away * ranks_needed(moe, RANKS),
    }
    return {"figures": figures, "details": {"windows": len(windows), "copies": layers}}
