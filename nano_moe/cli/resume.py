"""`resume RUN`: go on from the newest whole checkpoint, bit for bit as if never stopped."""

from __future__ import annotations

import argparse

from nano_moe import accounting, runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.finish import finish
from nano_moe.cli.output import print_count
from nano_moe.errors import UserError
from nano_moe.launch import own_rank


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
    if not found.has_begun and "imported" in found.manifest():
        raise UserError(
            f"{found.path}: imported weights come without the optimizer's state; score or sample "
            "them, or start a sparse run from a dense one with model.moe.init_from"
        )
    step = int(runs.newest(found).content["global_step"])
    if step >= recipe.trainer.steps:
        raise UserError(
            f"{found.path}: finished at step {step}; nothing to resume, "
            f"score it with: make eval RUN={found.name}"
        )
    if own_rank(recipe) == 0:
        print_count(str(found.recipe_file), accounting.count(recipe), to_stderr=args.json)
    from nano_moe.text.store import prepare
    from nano_moe.training.fit import fit
    from nano_moe.training.processes import started

    model = recipe.model
    with started(recipe, args.arguments) as job:
        job.advise(found)
        corpus = job.first(lambda: prepare(recipe.data, model.vocab_size, model.context))
        result = fit(found, recipe, corpus, resume=True)
    return finish(found, recipe, corpus, result, as_json=args.json) if job.leads else 0
