"""`bench NAME`: time layers, steps, other libraries, decoding, exchanges, input, the explorer."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano_moe import files, runs
from nano_moe.cli.arguments import add_json
from nano_moe.cli.output import finite, print_json, print_table
from nano_moe.errors import UserError

if TYPE_CHECKING:
    from nano_moe.bench.report import Report

BENCHMARKS = (
    "layer", "step", "peers", "optimizer", "data", "prepare", "decode", "char", "explore",
    "offload", "comm",
)  # fmt: skip
OPTIONS = {"peers": "litgpt_python", "prepare": "megabytes", "offload": "run"}  # of one each
DRAWN = {"offload"}  # these leave a PNG beside their JSON
FOLDER = runs.ROOT / "bench"
MARK = "nano_moe_bench"  # a key of every file that this verb writes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", metavar="FILE", help=f"JSON; omitted: {FOLDER}{os.sep}<name>.json")
    parser.add_argument("--threads", type=int, metavar="N", help="omitted: as many as torch takes")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see it work: the figures say nothing"
    )
    parser.add_argument(
        "--litgpt-python",
        metavar="PATH",
        help="peers: the interpreter of an environment with litgpt",
    )
    parser.add_argument("--megabytes", type=int, metavar="N", help="prepare: of text; omitted: 200")
    parser.add_argument("--run", metavar="RUN", help="offload: a trained run, for its hits")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    options = {}
    for name, option in OPTIONS.items():
        given = getattr(args, option)
        if args.name == name:
            options[option] = given
        elif given is not None:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag}: bench {args.name} has no use for it; drop it")
    stem = f"{args.name}-quick" if args.quick else args.name
    out = Path(args.out) if args.out is not None else FOLDER / f"{stem}.json"
    check_out(out, out.with_suffix(".png") if args.name in DRAWN else None)
    from nano_moe.bench.machine import get_ready

    get_ready(args.threads)
    benchmark = getattr(importlib.import_module(f"nano_moe.bench.{args.name}"), args.name)
    report: Report = benchmark(args.quick, **options)
    report = _without_targets(report) if args.quick else report
    content = {MARK: args.name, "quick": args.quick, "git_commit": runs.git_commit()}
    content |= report.as_json()
    files.make_folder(out.parent)
    files.write_text(out, json.dumps(finite(content), indent=1) + "\n")
    if report.figure:
        with files.replacing(out.with_suffix(".png")) as file:
            file.write(report.figure)
    if args.json:
        print_json(content)
    else:
        _print(report)
    drawn = f", drawn in {out.with_suffix('.png')}" if report.figure else ""
    print(f"written to {out}{drawn}", file=sys.stderr)


def _without_targets(report: Report) -> Report:
    """Toy shapes meet no target, and miss none."""
    rows = [
        {key: value for key, value in row.items() if key != "met" and not key.endswith("target")}
        for row in report.rows
    ]
    return dataclasses.replace(report, rows=rows)


def check_out(path: Path, figure: Path | None) -> None:
    """Raises UserError where the result could not be written, or would replace another file."""
    if figure and (path == figure or figure.exists() and not path.exists()):
        raise UserError(f"--out {path}: its figure would replace {figure}; name another file")
    if path.exists():
        if not _is_ours(path):
            raise UserError(f"--out {path}: exists and is no result of bench; name another file")
        return
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {path}: {parent} is no folder to write in; name another file")


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and MARK in content


def _print(report: Report) -> None:
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    for keys, rows in itertools.groupby(report.rows, key=tuple):
        print_table(report.title, keys, [[cell(row[key]) for key in keys] for row in rows])
    print("Figures in brackets are quartiles.")
    for note in report.notes:
        print(note)


def cell(value: Any) -> str:
    """A figure to four digits, a spread to three with its quartiles in brackets."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        lower, median, upper = map(_short, value)
        return f"{median} ({lower}–{upper})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _short(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
