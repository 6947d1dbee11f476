"""`study ACTION`: published claims, tested and read by rules set before."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nano_moe.cli.arguments import add_json
from nano_moe.cli.output import figure, params, print_json, print_table, si, size
from nano_moe.errors import UserError

if TYPE_CHECKING:
    from nano_moe.studies.catalogue import Found, Place


ACTIONS = {
    "run": "train what is left of it, write its results and the report",
    "count": "parameters, FLOPs, and estimates of memory and time on a GPU; trains nothing",
    "verify": "train one of its runs again and compare",
    "collect": "write its results anew from finished runs",
    "report": "write RESULTS.md, figures and the README's table anew from results",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {does}" for name, does in ACTIONS.items()),
    )
    parser.add_argument("study", metavar="STUDY", nargs="*", help="its name; omitted: every study")
    parser.add_argument(
        "--tier",
        choices=("full", "smoke", "gpu"),
        default="full",
        help="smoke: models of a few weights, in seconds, verdicts withheld; gpu: the same study "
        "at the size of recipes/gpu, for one GPU of 24 to 80 GB: not run by us",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="trainings side by side, of one thread each; omitted: one a core",
    )
    parser.add_argument("--seed", type=int, help="verify: draws the run; omitted: any")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from nano_moe.studies import catalogue

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    tiers = {"run": ("full", "smoke", "gpu"), "count": ("gpu",)}.get(args.action, ("full",))
    if args.tier not in tiers:
        whole = tiers == ("full",)
        cure = (
            "takes full runs only; drop --tier"
            if whole
            else f"takes only --tier {', '.join(tiers)}"
        )
        raise UserError(f"study {args.action}: {cure}")
    if args.seed is not None and args.action != "verify":
        raise UserError(f"study {args.action}: draws no run; drop --seed")
    if args.workers is not None and (args.action != "run" or args.tier == "smoke"):
        raise UserError(f"--workers {args.workers}: only full runs take it; drop it")
    if args.action == "report":
        if args.study:
            raise UserError("study report: takes all finished studies; name none")
        return _report(args)
    chosen = [catalogue.find(name) for name in args.study] or catalogue.everything()
    if not chosen:
        raise UserError(f"{catalogue.STUDIES}: holds no study; restore the folder")
    ordered = catalogue.in_running_order(chosen)
    if args.tier == "smoke":
        with catalogue.smoke_place() as place:
            act = functools.partial(_smoke, place=place)
            return max(_guarded(act, found, args) for found in ordered)
    verb = {"run": _run, "count": _count, "verify": _verify, "collect": _collect}[args.action]
    ordered = [found.larger if args.tier == "gpu" else found for found in ordered]
    statuses = [_guarded(verb, found, args) for found in ordered]
    if args.action in ("run", "collect") and args.tier == "full" and 0 in statuses:
        _report(args)
    return max(statuses)


def _guarded(
    act: Callable[[Found, argparse.Namespace], int], found: Found, args: argparse.Namespace
) -> int:
    """A fault of one study costs that one and not those after it."""
    try:
        return act(found, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(found: Found, args: argparse.Namespace) -> int:
    from nano_moe.studies import catalogue

    try:
        outcome = catalogue.run(found, workers=args.workers)
    except KeyboardInterrupt:
        tier = "" if args.tier == "full" else f" TIER={args.tier}"
        print(f"go on with: make reproduce STUDY={found.name}{tier}", file=sys.stderr)
        raise
    for name, fault in outcome.failed.items():
        print(f"error: {found.name}: {name}: {fault}", file=sys.stderr)
    if outcome.results is None:
        print(f"{found.name}: no verdict while runs are missing", file=sys.stderr)
        return 1
    _print(outcome.results, args)
    return 0


def _count(found: Found, args: argparse.Namespace) -> int:
    from nano_moe.studies import catalogue, tiers

    costs = catalogue.costs(found)
    if args.json:
        members = {name: {"runs": runs, **cost._asdict()} for name, (runs, cost) in costs.items()}
        print_json({"study": found.name, "tier": args.tier, "members": members})
        return 0
    rows = [
        (
            name,
            str(runs),
            params(cost.total_params),
            params(cost.active_params),
            si(cost.tokens),
            f"{cost.flops:.2e}",
            size(cost.memory_bytes),
            f"{cost.seconds / 3600:.1f} h",
        )
        for name, (runs, cost) in costs.items()
    ]
    header = ("member", "runs", "total", "active", "tokens", "FLOPs", "memory", "time")
    print_table(f"{found.name}, {args.tier} tier, each run", header, rows)
    hours = sum(runs * cost.seconds for runs, cost in costs.values()) / 3600
    print(
        f"In all {hours:,.0f} h. Memory and time are estimates for a GPU, not run by us: time is "
        f"FLOPs over {tiers.SHARE:.0%} of a stated peak of {tiers.PEAK / 1e12:.0f} TFLOP/s (A100, "
        "bf16); memory is the CPU path's peak and wide logits."
    )
    return 0


def _collect(found: Found, args: argparse.Namespace) -> int:
    from nano_moe.studies import catalogue

    _print(catalogue.collect(found), args)
    return 0


def _smoke(found: Found, args: argparse.Namespace, place: Place) -> int:
    from nano_moe.studies import catalogue

    _print(catalogue.smoke(found, place), args)
    return 0


def _verify(found: Found, args: argparse.Namespace) -> int:
    from nano_moe.studies import catalogue

    outcome = catalogue.verify(found, args.seed)
    if args.json:
        print_json(outcome)
    else:
        print(f"{found.name}: {outcome['run']}: {_found_again(outcome)}")
    return 0 if outcome["holds"] else 1


def _found_again(outcome: dict[str, Any]) -> str:
    where = {"same_machine": "another machine", "same_sources": "changed sources"}
    other = ", ".join(what for name, what in where.items() if not outcome[name])
    holds = "equal to the bit" if outcome["exact"] else "near enough"
    says = f"{holds}: it holds" if outcome["holds"] else "IT DOES NOT HOLD"
    on = f" on {other}" if other else ""
    return f"{outcome['stored']} stored, {outcome['again']} again{on}; {says}"


def _report(args: argparse.Namespace) -> int:
    from nano_moe.studies import report

    for path in report.write():
        print(path, file=sys.stderr)
    return 0


def _print(content: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(content)
        return
    if "grid" in content:
        grid = content["grid"]
        rows = [
            (name, *(figure(ce) for ce in row["ce"].values()), f"{row['best']:g}")
            for name, row in grid["members"].items()
        ]
        values = list(next(iter(grid["members"].values()))["ce"])
        print_table(content["study"], (grid["field"], *values, "best"), rows)
        return
    rows = [
        (
            one["says"],
            figure(one["mean"]),
            f"{figure(one['low'])} to {figure(one['high'])}",
            str(one["n"]),
            figure(one["detectable"]),
            one["verdict"],
        )
        for one in content["comparisons"]
    ]
    print_table(content["study"], ("claim", "gain", "95 %", "n", "detectable", "verdict"), rows)
