"""Experts left on disk: what decoding costs by their budget, and how many calls find theirs.

Shapes: W windows of T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from nano_moe.bench.file_cache import check_can_be_emptied, check_left
from nano_moe.bench.offload import Case, draw_weights, drawn_text, measure
from nano_moe.evaluation import spread_windows
from nano_moe.inference.decoding import Decoding
from nano_moe.inference.expert_file import EXPERTS, REST
from nano_moe.inference.offload import ExpertStore, load_offloaded
from nano_moe.runs import Run
from nano_moe.studies.schema import ALL
from nano_moe.text.store import Corpus

SHARES = (25, 50)  # per cent of the experts
WINDOWS = 8  # spread over the validation split


def decode(run: Run, budget: str) -> dict[str, Any]:
    """Memory, milliseconds per token with a warm and a cold cache of the file, and hits.

    Of weights as drawn, which lie in the run's folder meanwhile. Memory is what decoding holds of
    its own; pages of the file, which the system may drop at any time, are not in it. Raises
    UserError where the cache does not empty.
    """
    if budget != ALL:
        check_can_be_emptied(run.path)
    draw_weights(run)
    case = Case(str(run.path), drawn_text(run.recipe()), None if budget == ALL else budget)
    try:
        warm: dict[str, Any] = measure(case)
        cold: dict[str, Any] = (
            warm if case.budget is None else measure(dataclasses.replace(case, cold=True))
        )
        check_left(cold["still cached"] or 0, run.path)
    finally:
        for name in (run.best.name, EXPERTS, REST):
            (run.path / name).unlink(missing_ok=True)
    return {
        "memory_gb": max(
            warm["anonymous, GB"], warm["experts, GB"]
        ),  # it may have held more before
        "decode_ms_per_token": 1e3 / warm["tokens/s"],
        "cold_ms_per_token": 1e3 / cold["tokens/s"],
        "half_speed_ms_per_token": 2e3 / warm["tokens/s"],
        "hits": warm["hits"],
    }


def look(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Of validation text read token by token, the calls for an expert in memory or on its way.

    `chance`: what choices without memory would find; `lru_hits`: with the experts used last;
    `hits`: with guesses from the next layer's router, too, of which `guesses_right` were called.
    """
    inputs, _, _ = spread_windows(corpus, run.recipe().model.context, WINDOWS)
    figures, counts = {}, {}
    for share in SHARES:
        alone, ahead = (_read(run, inputs, f"{share}%", prefetch=p) for p in (False, True))
        figures[f"chance_{share}"] = len(alone.first) / len(alone.file.keys)
        figures[f"lru_hits_{share}"] = alone.counts.hit_rate
        figures[f"hits_{share}"] = ahead.counts.hit_rate
        counts[str(share)] = {"lru": alone.counts._asdict(), "ahead": ahead.counts._asdict()}
    guesses = counts[str(SHARES[0])]["ahead"]
    figures["guesses_right"] = guesses["guessed_right"] / max(1, guesses["guessed"])
    return {"figures": figures, "details": {"windows": len(inputs), "counts": counts}}


def _read(run: Run, windows: Tensor, budget: str, *, prefetch: bool) -> ExpertStore:
    """The store after (W, T) tokens, one window after the other."""
    _, model, _, store = load_offloaded(run, budget, prefetch=prefetch)
    for window in windows.tolist():
        decoding = Decoding(model, [window[:1]])
        for token in window[1:]:
            decoding.next_logits()
            decoding.append([token], [True])
        decoding.next_logits()
    return store
