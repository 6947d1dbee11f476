"""`count RECIPE`: what a recipe costs, from its fields alone."""

from __future__ import annotations

import argparse

from nano_moe import accounting, recipe_file
from nano_moe.cli.arguments import add_json, add_recipe
from nano_moe.cli.output import print_count, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    counted = accounting.count(recipe_file.load(args.recipe, args.overrides))
    if args.json:
        print_json(counted._asdict())
    else:
        print_count(args.recipe, counted)
