"""`prepare RECIPE`: text to tokens on disk, once."""

from __future__ import annotations

import argparse

from nano_moe import recipe_file
from nano_moe.cli.arguments import add_json, add_recipe
from nano_moe.cli.output import print_json, print_table


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    recipe = recipe_file.load(args.recipe, args.overrides)
    from nano_moe.text.store import prepare

    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context)
    found = {"path": str(corpus.path), "sha256": corpus.sha256, **corpus.meta}
    if args.json:
        print_json(found)
        return
    print(f"{corpus.path}: {len(corpus.train):,} training tokens, {len(corpus.val):,} held out")
    header = ("domain", "train bytes", "train tokens", "val bytes", "val tokens")
    rows = []
    for name, splits in corpus.meta["domains"].items():
        figures = [
            splits[split][what] for split in ("train", "val") for what in ("bytes", "tokens")
        ]
        rows.append((name, *(f"{figure:,}" for figure in figures)))
    print_table("", header, rows)
