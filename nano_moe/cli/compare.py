"""`compare RUN RUN …`: validation figures at equal tokens, training FLOPs and seconds."""

from __future__ import annotations

import argparse
from typing import Any

from nano_moe import runs
from nano_moe.cli.arguments import add_json
from nano_moe.cli.output import duration, figure, print_json, print_table, si
from nano_moe.comparison import compare


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="names under checkpoints/, or paths")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    compared = compare([runs.find(name) for name in args.runs])
    if args.json:
        print_json(compared)
    else:
        _print(compared)


def _print(compared: dict[str, Any]) -> None:
    budgets = compared["budgets"]
    header = (
        "run",
        "total",
        "active",
        "CE\nat end",
        "bits/byte",
        f"CE at\n{si(budgets['tokens'])}\ntokens",
        f"CE at\n{si(budgets['flops'])}FLOP",
        f"CE at\n{duration(budgets['seconds'])}",
    )
    rows = []
    for row in compared["runs"]:
        parameters = row["parameters"]
        at = [figure(row[f"at_equal_{b}"]["ce"]) for b in ("tokens", "flops", "seconds")]
        totals = [si(parameters.get(kind, 0)) for kind in ("total", "active")]
        final = [figure(row["final"]["ce"]), figure(row["final"]["bpb"])]
        rows.append((row["run"], *totals, *final, *at))
    print_table("", header, rows)
    if any("–" in row for row in rows):
        print("–: this run had no validation so early.")
    for row in compared["runs"]:
        source = row["init_from"]
        if source is not None:
            print(
                f"{row['run']} starts from the weights of {source['run']}, whose "
                f"{si(source['tokens'])} tokens and {si(source['flops'])}FLOP are not counted."
            )
    if len({row["corpus"] for row in compared["runs"]}) > 1:
        print("These runs were trained on different text: their losses do not compare.")
