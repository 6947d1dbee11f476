"""`explore RUN [RUN …]`: a page on this machine that shows runs at work."""

from __future__ import annotations

import argparse

from nano_moe.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--port", type=int, help="omitted: 7860, or a free one where it is taken")
    parser.add_argument("--no-browser", action="store_true", help="print the address alone")


def add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a name or path below checkpoints/; several: beside"
    )


def run(args: argparse.Namespace) -> None:
    if args.port is not None and not 1 <= args.port <= 65_535:
        raise UserError(f"--port {args.port}: must be 1 to 65535")
    from nano_moe.explorer.opened import find

    opened = [find(name) for name in dict.fromkeys(args.runs)]
    from nano_moe.explorer.server import serve

    serve(opened, port=args.port, browse=not args.no_browser)
