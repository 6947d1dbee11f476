"""`break-even`: the share of dense runs' tokens, and time, that sparse runs need for their loss."""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

from nano_moe import runs
from nano_moe.break_even import break_even, by_budget
from nano_moe.cli.arguments import add_json
from nano_moe.cli.output import figure, print_json, print_table, si
from nano_moe.errors import UserError

Row = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    for side in ("dense", "sparse"):
        parser.add_argument(
            f"--{side}",
            metavar="RUN",
            nargs="+",
            required=True,
            help=f"finished {side} runs: names under checkpoints/, or paths",
        )
    parser.add_argument(
        "--step-ratio",
        type=float,
        metavar="R",
        help="time of a sparse step over a dense one, from `nano-moe bench step`",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.step_ratio is not None and not 0 < args.step_ratio < math.inf:
        raise UserError(
            f"--step-ratio {args.step_ratio:g}: a sparse step's time over a dense one's, above 0"
        )
    dense, sparse = ([runs.find(name) for name in names] for names in (args.dense, args.sparse))
    rows = break_even(dense, sparse)
    if args.json:
        for row in rows:
            known = row["share"] is not None and args.step_ratio is not None
            row["time_share"] = row["share"] * args.step_ratio if known else None
        print_json({"step_ratio": args.step_ratio, "rows": rows})
    else:
        _print(rows, args.step_ratio)


def _print(rows: list[Row], step_ratio: float | None) -> None:
    at = sorted({_share(row, point) for row in rows for point in row["sparse"]})
    header = ("dense tokens", "seed", "dense CE", *(f"sparse CE\nat {share:g}" for share in at))
    header = (*header, "tokens", *(("time",) if step_ratio else ()))
    lines: list[tuple[str, ...]] = []
    for tokens, group in by_budget(rows).items():
        for row in group:
            ce = {_share(row, point): point["ce"] for point in row["sparse"]}
            cells = [figure(ce.get(share)) for share in at]
            budget = _needed(row, step_ratio)
            lines.append((si(tokens), str(row["seed"]), figure(row["dense_ce"]), *cells, *budget))
        known = [row["share"] for row in group if row["share"] is not None]
        if len(known) == len(group) > 1:
            lines.append(_mean(group, known, len(at), step_ratio))
    print_table("", header, lines)
    print("tokens: share of the dense run's tokens at which a sparse run ends as low, between the")
    print("two budgets around it; < and >: outside of the budgets that were run.")
    if step_ratio:
        print(f"time: the same times {step_ratio:g}, a sparse step's time over a dense one's.")


def _share(row: Row, point: Row) -> float:
    return round(float(point["tokens"] / row["tokens"]), 2)


def _needed(row: Row, step_ratio: float | None) -> list[str]:
    """Shares of tokens and of time, or their bounds."""
    known, scales = row["share"], [1.0, *([step_ratio] if step_ratio else [])]
    if known is not None:
        return [f"{known * scale:.3f}" for scale in scales]
    sign, bound = (">", row["above"]) if row["below"] is None else ("<", row["below"])
    return [f"{sign} {bound * scale:.2f}" for scale in scales]


def _mean(
    group: list[Row], known: list[float], gap: int, step_ratio: float | None
) -> tuple[str, ...]:
    mean, dense = statistics.mean(known), statistics.mean(row["dense_ce"] for row in group)
    times = [f"{mean * step_ratio:.3f}"] if step_ratio else []
    return ("", f"mean of {len(group)}", figure(dense), *[""] * gap, f"{mean:.3f}", *times)
