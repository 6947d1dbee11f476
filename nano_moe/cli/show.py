"""`show RECIPE`: the resolved recipe as YAML, ready to be saved and run."""

from __future__ import annotations

import argparse

from nano_moe import recipe_file
from nano_moe.cli.arguments import add_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)


def run(args: argparse.Namespace) -> None:
    print(recipe_file.dump(recipe_file.load_any(args.recipe, args.overrides)), end="")
