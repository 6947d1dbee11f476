"""`eval RUN`: cross-entropy, bits per byte and routing over the whole validation split."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from nano_moe import runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.output import figure, print_json, print_table

if TYPE_CHECKING:
    from nano_moe.evaluation import Evaluation


LISTED = ("layer", "load", "domain_load")  # not one figure each


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    found = runs.find(args.run)
    from nano_moe.device import choose_device, choose_precision
    from nano_moe.evaluation import evaluate
    from nano_moe.text.store import prepare

    stored = found.recipe()
    stored.model.check_causal()
    device = choose_device(stored)
    recipe, model, step = runs.load_model(found, device=device.type)
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context)
    runs.check_corpus(found, corpus)
    print(f"{found.path}: weights of step {step}", file=sys.stderr)
    scored = evaluate(
        model,
        corpus,
        batch_size=recipe.trainer.batch_size,
        precision=choose_precision(recipe),
    )
    if args.json:
        print_json(scored.as_json())
    else:
        _print(scored)


def _print(scored: Evaluation) -> None:
    scores = [*scored.domains.items(), ("all", scored.overall)]
    rows = [
        (name, figure(s.ce), figure(s.bpb), figure(s.as_json()["perplexity"], 2), f"{s.tokens:,}")
        for name, s in scores
    ]
    print_table("validation", ("domain", "CE (nats)", "bits/byte", "perplexity", "tokens"), rows)
    if scored.routing:
        names = tuple(name for name in scored.routing[0] if name not in LISTED)
        routing = [
            (str(row["layer"]), *(figure(row[name], 3) for name in names)) for row in scored.routing
        ]
        heads = tuple(name.replace("_", "\n") for name in names)
        print_table(
            "routing (README.md, Reading a run, says what is what)", ("layer", *heads), routing
        )
