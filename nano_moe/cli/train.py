"""`train RECIPE`: prepare the text, say what it costs, train, say what came of it."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nano_moe import accounting, recipe_file, runs
from nano_moe.cli.arguments import add_json, add_recipe
from nano_moe.cli.finish import finish
from nano_moe.cli.output import note_processes, print_count
from nano_moe.config import Recipe
from nano_moe.launch import check_count, own_rank

if TYPE_CHECKING:
    from nano_moe.text.store import Corpus
    from nano_moe.training.fit import Result
    from nano_moe.training.processes import Job


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--name", help="name of the run; omitted: <recipe>-<next free number>")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    recipe = recipe_file.load(args.recipe, args.overrides)
    check_count(recipe)
    runs.source_of(recipe)
    if own_rank(recipe) == 0:
        if args.name is not None:
            runs.check_name_is_free(args.name)
        print_count(args.recipe, accounting.count(recipe), to_stderr=args.json)
        note_processes(recipe)
    from nano_moe.device import check_memory

    check_memory(recipe)
    from nano_moe.training.processes import started

    with started(recipe, args.arguments) as job:
        created, corpus, result = _train(job, recipe, args)
    return finish(created, recipe, corpus, result, as_json=args.json) if job.leads else 0


def _train(job: Job, recipe: Recipe, args: argparse.Namespace) -> tuple[runs.Run, Corpus, Result]:
    from nano_moe.text.store import prepare

    model, stem = recipe.model, runs.stem_of(Path(args.recipe))
    corpus = job.first(lambda: prepare(recipe.data, model.vocab_size, model.context))
    from nano_moe.training.fit import fit

    created = job.agreed(lambda: runs.create(recipe, stem=stem, name=args.name))
    job.advise(created, recipe)
    try:
        if job.leads:
            print(f"run {created.path}", file=sys.stderr)
        return created, corpus, fit(created, recipe, corpus)
    finally:
        # It never began: leave no empty folder under that name.
        if job.leads and not created.has_begun:
            shutil.rmtree(created.path, ignore_errors=True)
