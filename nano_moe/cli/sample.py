"""`sample RUN`: continue prompts; the text of a single one streams as it is drawn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

from nano_moe import runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--prompt", action="append", help="text to continue (The); several are drawn together"
    )
    parser.add_argument("--tokens", type=int, default=200, help="at most this many (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest only")
    parser.add_argument("--top-p", type=float, default=0.95, help="likeliest mass kept (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    found = runs.find(args.run)
    from nano_moe.inference.generate import check_sampling, generate_all
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
    prompts = args.prompt or ["The"]
    pieces = generate_all(model, tokenizer, prompts, **settings)
    if len(prompts) == 1 and not args.json:
        _stream(prompts[0], (piece for _, piece in pieces))
        return
    begun = time.perf_counter()
    texts = _together(len(prompts), pieces)
    seconds = time.perf_counter() - begun
    if args.json:
        rows = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        print_json({"samples": rows, "step": step, "seconds": seconds})
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}\n")


def _stream(prompt: str, pieces: Iterable[str]) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _together(n: int, pieces: Iterable[tuple[int, str]]) -> list[str]:
    texts = [""] * n
    for row, piece in pieces:
        texts[row] += piece
    return texts
