"""`report-html RUN [RUN …] --out FILE`: the explorer's page as one file that stands alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nano_moe import files
from nano_moe.cli.explore import add_runs
from nano_moe.cli.output import size
from nano_moe.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the page to write")
    parser.add_argument(
        "--passages", type=int, metavar="N", help="of each domain; omitted: 1 to 3, as many as fit"
    )


def run(args: argparse.Namespace) -> None:
    from nano_moe.explorer.opened import find
    from nano_moe.explorer.passages import EACH
    from nano_moe.explorer.report import check_out, report

    if args.passages is not None and not 1 <= args.passages <= EACH:
        raise UserError(f"--passages {args.passages}: must be 1 to {EACH}")

    out = Path(args.out)
    check_out(out)
    opened = [find(name) for name in dict.fromkeys(args.runs)]
    page = report(opened, args.passages)
    files.write_text(out, page)
    print(f"{out}: {size(len(page.encode()))}, opens in any browser", file=sys.stderr)
