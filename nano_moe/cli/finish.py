"""What `train` and `resume` say at the end."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from nano_moe.checkpoints import load_model
from nano_moe.cli.output import duration, print_json
from nano_moe.config import Recipe
from nano_moe.runs import Run, resume_command

if TYPE_CHECKING:
    from nano_moe.text.store import Corpus
    from nano_moe.training.fit import Result

BESIDE = "beside other runs in the browser: make tensorboard"
NOT_EVALUATED = (
    "not evaluated: with routing=expert_choice a token's experts depend on the tokens after it, so "
    "train/ce is no language-modelling loss and must not be compared"
)


def finish(run: Run, recipe: Recipe, corpus: Corpus, result: Result, *, as_json: bool) -> int:
    """Print the outcome; the exit status."""
    if result.stopped_by is not None:
        print(
            f"stopped at step {result.step} of {recipe.trainer.steps} by {result.stopped_by}; "
            f"go on with: {resume_command(run, recipe)}",
            file=sys.stderr,
        )
        return 128 + signal.Signals[result.stopped_by]
    figures = {"run": run.name, "step": result.step, "seconds": round(result.seconds, 1)}
    trained = f"{run.path}: {result.step} steps in {duration(result.seconds)} of training"
    if result.evaluation is None:
        if as_json:
            print_json({**figures, "ce": None})
        else:
            print(f"{trained}\n{NOT_EVALUATED}\n{BESIDE}")
        return 0
    overall = result.evaluation.overall
    if as_json:
        print_json({**figures, **result.evaluation.as_json()})
        return 0
    print(
        f"{trained}\n"
        f"validation loss {overall.ce:.4f} nats per token, {overall.bpb:.4f} bits per byte "
        f"({overall.tokens:,} tokens)\n"
        f"{_sample(run, recipe, corpus)}\n"
        f"{BESIDE}"
    )
    return 0


def _sample(run: Run, recipe: Recipe, corpus: Corpus) -> str:
    from nano_moe.inference.generate import generate

    _, model, step = load_model(run)
    prompt = recipe.trainer.sample_prompt
    text = prompt + "".join(generate(model, corpus.tokenizer, prompt, max_tokens=100))
    best = "" if step == recipe.trainer.steps else f" (best.ckpt, of step {step})"
    return f"sample{best}: {text}"
