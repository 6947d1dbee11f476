"""Arguments that several verbs share."""

from __future__ import annotations

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, such as recipes/dense.yaml"
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="fields to change: optim.lr=0.01"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a name under checkpoints/, or a path")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout and nothing else there"
    )
