"""`import DIR`: a Hugging Face folder as a run, to evaluate, sample from and train on."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nano_moe import recipe_file, runs
from nano_moe.cli.arguments import add_json
from nano_moe.cli.extras import need
from nano_moe.cli.output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="holds config.json and *.safetensors")
    parser.add_argument("--name", help="of the new run (default: the folder's)")
    parser.add_argument(
        "--recipe", help="text and training for a folder that was not exported here"
    )
    parser.add_argument(
        "--context", type=int, help="positions to keep, no more than the config's (default: all)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    name = args.name or re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name).strip("-.") or "run"
    runs.check_name_is_free(name)
    rest = recipe_file.load(args.recipe) if args.recipe else None
    need("export", "transformers")
    from nano_moe.export import importing
    from nano_moe.text.store import prepare

    source = importing.read(folder, rest)
    recipe = importing.recipe_of(source, rest, folder, context=args.context)
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context) if rest else None
    made = importing.import_run(source, recipe, folder, name=name, corpus=corpus)
    if args.json:
        print_json({"run": name, "path": str(made.path), "architecture": source.family})
        return
    print(
        f"{made.path}: {source.family}, from {folder}; score it with: make eval RUN={name}, "
        f"train it on with: make resume RUN={name}"
    )
