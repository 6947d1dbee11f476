"""`sample RUN`: continue prompts; the text of a single one streams as it is drawn."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nano_moe import checkpoints, runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.output import print_json
from nano_moe.errors import UserError
from nano_moe.runs import Run

if TYPE_CHECKING:
    from nano_moe.inference.offload import ExpertStore
    from nano_moe.model.gpt import GPT


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue (The); give it again for more, which are drawn together",
    )
    parser.add_argument("--tokens", type=int, default=200, help="at most this many (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest only")
    parser.add_argument("--top-p", type=float, default=0.95, help="likeliest mass kept (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    parser.add_argument(
        "--expert-budget", metavar="SIZE", help="leave experts on disk but for 25%% or 64MB of them"
    )
    parser.add_argument(
        "--expert-policy",
        choices=("lru", "lfu"),
        help="with --expert-budget: which expert makes room (lru)",
    )
    parser.add_argument(
        "--expert-prefetch",
        action="store_true",
        help="with --expert-budget: read ahead what the next layer's router would choose now",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    found = runs.find(args.run)
    for name in ("expert_policy", "expert_prefetch"):
        if getattr(args, name) and args.expert_budget is None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: only with --expert-budget, which leaves experts on disk")
    from nano_moe.inference.generate import check_sampling, generate_all
    from nano_moe.text.tokenizer import load_for

    settings = {
        "max_tokens": args.tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    check_sampling(**settings)
    model, step, store = _load(found, args)
    tokenizer = load_for(found.tokenizer_file, model.config.vocab_size)
    prompts = args.prompt or ["The"]
    pieces = generate_all(model, tokenizer, prompts, **settings)
    if len(prompts) == 1 and not args.json:
        _stream(prompts[0], (piece for _, piece in pieces))
        _tell(store, args.expert_prefetch)
        return
    begun = time.perf_counter()
    texts = _together(len(prompts), pieces)
    seconds = time.perf_counter() - begun
    if args.json:
        rows = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        experts = store and {**store.counts._asdict(), "hit_rate": store.counts.hit_rate}
        print_json({"samples": rows, "step": step, "seconds": seconds, "experts": experts})
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}\n")
    _tell(store, args.expert_prefetch)


def _load(run: Run, args: argparse.Namespace) -> tuple[GPT, int, ExpertStore | None]:
    if args.expert_budget is None:
        _, model, step = checkpoints.load_model(run)
        return model, step, None
    from nano_moe.inference.offload import load_offloaded

    how = {"policy": args.expert_policy or "lru", "prefetch": args.expert_prefetch}
    _, model, step, store = load_offloaded(run, args.expert_budget, **how)
    return model, step, store


def _tell(store: ExpertStore | None, ahead: bool) -> None:
    if store is not None:
        print(
            f"experts in memory: {len(store.first)} of {len(store.file.keys)}; "
            f"{store.counts.hit_rate:.0%} of {store.counts.hits + store.counts.misses:,} calls "
            f"found their expert there{' or on its way' if ahead else ''}",
            file=sys.stderr,
        )


def _stream(prompt: str, pieces: Iterable[str]) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _together(n: int, pieces: Iterable[tuple[int, str]]) -> list[str]:
    texts = [""] * n
    for row, piece in pieces:
        texts[row] += piece
    return texts
