"""`export RUN --to hf DIR`, `export RUN --to gguf FILE`: a run for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from nano_moe import runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.extras import need
from nano_moe.cli.output import print_json
from nano_moe.errors import UserError

QUANTS = ("f32", "f16", "q8_0", "q4_0", "experts-q8_0", "experts-q4_0")


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("target", metavar="TARGET", help="a folder (hf) or file (gguf) to make")
    parser.add_argument(
        "--to", required=True, choices=("hf", "gguf"), help="Hugging Face, or GGUF of llama.cpp"
    )
    parser.add_argument("--quant", choices=QUANTS, help="gguf: how weights are stored (f32)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.quant and args.to != "gguf":
        raise UserError("--quant: only with --to gguf; Hugging Face folders are exported in fp32")
    found = runs.find(args.run)
    need("export", "transformers", "gguf")
    written = _to_hf(found, args) if args.to == "hf" else _to_gguf(found, args)
    if args.json:
        print_json(written)
        return
    print(f"{written['path']}: {written['architecture']}, weights of step {written['step']}")
    for note in written["notes"]:
        print(note)


def _to_hf(found: runs.Run, args: argparse.Namespace) -> dict:
    from nano_moe.export.hugging_face import export

    written = export(found, Path(args.target))
    compared = f"Loaded again, its logits differ from ours by {written.difference:.1e} at most."
    return written._asdict() | {"path": args.target, "notes": [*written.notes, compared]}


def _to_gguf(found: runs.Run, args: argparse.Namespace) -> dict:
    from nano_moe.export.gguf_file import export

    return export(found, Path(args.target), args.quant or "f32")._asdict() | {"path": args.target}
