"""Whole training steps of the anchor recipe and its sparse twins, without a trainer around them."""

from __future__ import annotations

from collections.abc import Iterator

from nano_moe.bench.bare import BareStep
from nano_moe.bench.dense import SeparateFFN
from nano_moe.bench.recipes import DECODERS, RandomTokens, recipe
from nano_moe.bench.report import Report, Row
from nano_moe.bench.startup import overhead, start_up
from nano_moe.bench.timing import QUICK, Budget, Timings, interleave
from nano_moe.model.ffn import FFN
from nano_moe.model.gpt import Block
from nano_moe.training.module import Decoder

SEPARATE = "dense, gate and up apart"
BASES = ("dense", SEPARATE)
# (case, base) -> the largest ratio aimed at; no base: the faster dense decoder.
TARGETS = {"8 experts top-2": 1.10, "64 experts top-8": 1.30}
GROWTH = {"64 experts top-8": 1.25, "64 experts top-2": None}  # over 8 experts top-2

NOTES = (
    "a step: forward with balancing terms, backward, gradient norm, clip, optimizer; ratio: over "
    "the faster of the two dense decoders, growth: over 8 experts top-2, both within a round.",
    "64 experts top-8 has experts of an equal active width, 64 experts top-2 those of 8 experts "
    "top-2, eight times as many: its share of the optimizer is what storage costs.",
    "bf16: float32 weights under autocast, as trainer.precision=bf16.",
)


def step(quick: bool) -> Report:
    budget = QUICK if quick else Budget(seconds=45, min_rounds=7)
    rows: list[Row] = []
    for precision in ("fp32", "bf16"):
        steps = {name: _step(name, precision, quick) for name in (*DECODERS, SEPARATE)}
        timings = interleave({name: one.run for name, one in steps.items()}, budget)
        rows += table(precision, steps, timings)
    return Report("Training steps", [*rows, *overhead(quick), *start_up(quick)], NOTES)


def table(precision: str, steps: dict[str, BareStep], timings: Timings) -> Iterator[Row]:
    """A row per decoder."""
    base = timings.fastest(BASES)
    for case, one in steps.items():
        ratio, growth = timings.ratio(case, base), timings.ratio(case, "8 experts top-2")
        target, most = TARGETS.get(case), GROWTH.get(case)
        checks = [(ratio, target), (growth, most)]
        met = [spread.median <= limit for spread, limit in checks if limit is not None]
        yield {
            "decoder": case,
            "precision": precision,
            "ms": timings.spread(case).scaled(1e3),
            "tokens/s": round(one.tokens / timings.spread(case).median),
            "ratio": ratio,
            "target": target,
            "growth": growth if case in GROWTH else None,
            "growth target": most,
            "met": all(met) if met else None,
            **{f"{part} share": share for part, share in one.shares(timings.rounds).items()},
            "rounds": timings.rounds,
        }


def _step(name: str, precision: str, quick: bool) -> BareStep:
    file = "dense" if name == SEPARATE else name
    chosen = recipe(file, f"trainer.precision={precision}", quick=quick)
    module = Decoder(chosen)
    if name == SEPARATE:
        for block in module.model.blocks:
            assert isinstance(block, Block) and isinstance(block.ffn, FFN)
            block.ffn = SeparateFFN(block.ffn)
    return BareStep(module, RandomTokens(chosen))
