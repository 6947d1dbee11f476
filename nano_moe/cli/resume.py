"""`resume RUN`: go on from the newest whole checkpoint, bit for bit as if never stopped.

A run of imported weights begins with them, at step 0.
"""

from __future__ import annotations

import argparse
import sys

from nano_moe import accounting, checkpoints, runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.finish import finish
from nano_moe.cli.output import note_processes, print_count
from nano_moe.errors import UserError
from nano_moe.launch import check_count, own_rank


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="other processes to go on with: trainer.devices=4 trainer.strategy=fsdp",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = runs.find(args.run)
    recipe = found.recipe(args.overrides)
    check_count(recipe)
    imported = found.is_untrained_import
    if imported:
        _check_text(found)
    else:
        _check_unfinished(found)
    if own_rank(recipe) == 0:
        print_count(str(found.recipe_file), accounting.count(recipe), to_stderr=args.json)
        note_processes(recipe)
        if imported:
            print(
                f"{found.path}: imported weights; training begins at step 0, with a fresh "
                "optimizer and warm-up",
                file=sys.stderr,
            )
    from nano_moe.text.store import prepare
    from nano_moe.training.fit import fit
    from nano_moe.training.processes import started

    model = recipe.model
    with started(recipe, args.arguments) as job:
        job.advise(found, recipe)
        corpus = job.first(lambda: prepare(recipe.data, model.vocab_size, model.context))
        result = fit(found, recipe, corpus, resume=True)
    return finish(found, recipe, corpus, result, as_json=args.json) if job.leads else 0


def _check_text(found: runs.Run) -> None:
    if "corpus" not in found.manifest():
        raise UserError(
            f"{found.manifest_file}: names no corpus, so the imported weights have no text to be "
            "trained on; import them with a recipe that has, such as --recipe recipes/base.yaml"
        )


def _check_unfinished(found: runs.Run) -> None:
    step = int(checkpoints.newest(found).content["global_step"])
    if step >= found.recipe().trainer.steps:
        raise UserError(
            f"{found.path}: finished at step {step}; nothing to resume, "
            f"score it with: make eval RUN={found.name}"
        )
