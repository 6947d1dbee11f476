"""`sample RUN`: continue a prompt; text streams as it is drawn."""

from __future__ import annotations

import argparse
import time

from nano_moe import runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--prompt", default="The", help="text to continue (default: The)")
    parser.add_argument("--tokens", type=int, default=200, help="at most this many (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest only")
    parser.add_argument("--top-p", type=float, default=0.95, help="likeliest mass kept (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    found = runs.find(args.run)
    from nano_moe.inference.generate import check_sampling, generate
    from nano_moe.text.tokenizer import Tokenizer, check_fits

    settings = {
        "max_tokens": args.tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    check_sampling(**settings)
    _, model, step = runs.load_model(found)
    tokenizer = Tokenizer.load(found.tokenizer_file)
    check_fits(tokenizer, model.config.vocab_size)
    pieces = generate(model, tokenizer, args.prompt, **settings)
    if args.json:
        begun = time.perf_counter()
        text = "".join(pieces)
        seconds = time.perf_counter() - begun
        print_json({"prompt": args.prompt, "text": text, "step": step, "seconds": seconds})
        return
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
