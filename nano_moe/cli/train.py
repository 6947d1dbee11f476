"""`train RECIPE`: prepare the text, say what it costs, train, say what came of it."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from nano_moe import accounting, recipe_file, runs
from nano_moe.cli.arguments import add_json, add_recipe
from nano_moe.cli.finish import finish
from nano_moe.cli.output import print_count


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--name", help="name of the run; omitted: <recipe>-<next free number>")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    recipe = recipe_file.load(args.recipe, args.overrides)
    if args.name is not None:
        runs.check_name_is_free(args.name)
    runs.source_of(recipe)
    print_count(args.recipe, accounting.count(recipe), to_stderr=args.json)
    from nano_moe.device import check_memory
    from nano_moe.text.store import prepare

    check_memory(recipe)
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context)
    from nano_moe.training.fit import fit

    created = runs.create(recipe, stem=runs.stem_of(Path(args.recipe)), name=args.name)
    try:
        print(f"run {created.path}", file=sys.stderr)
        result = fit(created, recipe, corpus)
    finally:
        if not created.has_begun:  # it never began: leave no empty folder under that name
            shutil.rmtree(created.path, ignore_errors=True)
    return finish(created, recipe, corpus, result, as_json=args.json)
