"""`tensorboard [RUN …] [--study NAME]`: runs side by side in the browser, laid out to compare."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nano_moe import runs
from nano_moe.errors import UserError
from nano_moe.runs import Run

COMPARISON = "#custom_scalars"  # the tab that needs no clicking
IMAGES = "images=100"  # TensorBoard keeps 10 of a tag by default


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="names under checkpoints/, or paths; omitted: all"
    )
    parser.add_argument("--study", metavar="NAME", help="the runs of a study, by member and seed")
    parser.add_argument("--port", type=int, default=6006)


def run(args: argparse.Namespace) -> int:
    if args.runs and args.study:
        raise UserError("tensorboard: name runs or a study, not both")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: a port is a number from 1 to 65535")
    chosen = _of_study(args.study) if args.study else {n: runs.find(n) for n in args.runs}
    with tempfile.TemporaryDirectory(prefix="nano-moe-board-") as folder:
        return _serve(_linked(chosen, Path(folder)) if chosen else runs.ROOT, args.port)


def _of_study(name: str) -> Mapping[str, Run]:
    from nano_moe.studies import catalogue

    return catalogue.runs_of(catalogue.find(name))


def _linked(chosen: Mapping[str, Run], folder: Path) -> Path:
    """A folder that holds these runs and no others, under names that tell them apart."""
    for name, one in chosen.items():
        place = folder / name.replace(" / ", " of ").replace("/", " of ")
        place.symlink_to(one.path.resolve(), target_is_directory=True)
    return folder


def _serve(folder: Path, port: int) -> int:
    print(f"http://127.0.0.1:{port}/{COMPARISON}   (Ctrl-C ends it)", file=sys.stderr)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--samples_per_plugin", IMAGES]
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:
        return 0
