"""The input pipeline against what the anchor's decoders take; the dense one takes most."""

from __future__ import annotations

from nano_moe.bench.bare import BareStep
from nano_moe.bench.recipes import RandomTokens, prepared, recipe, text_folder
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK, Budget, Case, interleave
from nano_moe.training.data import TokenData
from nano_moe.training.module import Decoder

INPUT = "input pipeline"
WORDS = 300_000
LEAST = 20  # times what a step of the anchor takes, on a CPU

NOTES = (
    "input pipeline: the training's own data loader over prepared tokens on disk, in this process; "
    "of step: the pipeline's time over that of the step, which waits for it.",
    "the pipeline's tokens over the step's: how many such steps it could feed at once.",
)


def data(quick: bool) -> Report:
    budget = QUICK if quick else Budget(seconds=20, max_rounds=200)
    with text_folder(WORDS // 10 if quick else WORDS) as (_, overrides):
        chosen = recipe("dense", *overrides, quick=quick)
        corpus = prepared(chosen)
        batches = iter(TokenData(corpus, chosen).train_dataloader())

        def read(number: int) -> None:
            next(batches)

        cases: dict[str, Case] = {INPUT: read}
        cases |= {
            f"{decoder} step, {precision}": _step(decoder, precision, quick)
            for decoder in ("dense", "8 experts top-2")
            for precision in ("fp32", "bf16")
        }
        timings = interleave(cases, budget)
    rows: list[Row] = []
    for case in cases:
        over = None if case == INPUT else timings.ratio(case, INPUT)
        rows.append(
            {
                "case": case,
                "ms": timings.spread(case).scaled(1e3),
                "tokens/s": round(chosen.tokens_per_step / timings.spread(case).median),
                "pipeline of step": None if case == INPUT else timings.ratio(INPUT, case),
                "pipeline's tokens over the step's": over,
                "target": None if over is None else LEAST,
                "met": None if over is None else over.median >= LEAST,
                "rounds": timings.rounds,
            }
        )
    return Report("The input pipeline", rows, NOTES)


def _step(decoder: str, precision: str, quick: bool) -> Case:
    chosen = recipe(decoder, f"trainer.precision={precision}", quick=quick)
    return BareStep(Decoder(chosen), RandomTokens(chosen)).run
