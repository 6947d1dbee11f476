"""`eval RUN`: figures and routing over the whole validation split, with small experts, or tasks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano_moe import checkpoints, runs
from nano_moe.cli.arguments import add_json, add_run
from nano_moe.cli.extras import need
from nano_moe.cli.output import figure, print_json, print_table, size
from nano_moe.errors import UserError

if TYPE_CHECKING:
    from nano_moe.evaluation import Evaluation
    from nano_moe.export.quantized import Stored
    from nano_moe.text.store import Corpus


LISTED = ("layer", "load", "domain_load")  # not one figure each


def configure(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--tasks",
        metavar="N",
        type=int,
        nargs="?",
        const=200,
        help="instead: N passages, pairs of each kind and gaps made of the validation text (200)",
    )
    parser.add_argument("--seed", type=int, help="with --tasks: draws them (0)")
    parser.add_argument("--out", help="with --tasks: a new folder for lm-evaluation-harness")
    parser.add_argument(
        "--quant-experts",
        action="store_true",
        help="instead: what experts in int8 and int4 cost in loss by domain, and save in bytes",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    found = runs.find(args.run)
    _check(args)
    from nano_moe.device import choose_device, choose_precision
    from nano_moe.evaluation import evaluate
    from nano_moe.text.store import prepare

    stored = found.recipe()
    stored.model.check_causal()
    if args.quant_experts:
        need("export", "gguf")
        from nano_moe.export.gguf_file import check_experts

        check_experts(stored.model)
    device = choose_device(stored)
    recipe, model, step = checkpoints.load_model(found, device=device.type)
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context)
    runs.check_corpus(found, corpus)
    print(f"{found.path}: weights of step {step}", file=sys.stderr)
    batch_size = recipe.trainer.batch_size
    if args.tasks is not None:
        _score_tasks(args, model, corpus, batch_size)
        return
    if args.quant_experts:
        _score_quantized(args, model, corpus, batch_size)
        return
    scored = evaluate(model, corpus, batch_size=batch_size, precision=choose_precision(recipe))
    if args.json:
        print_json(scored.as_json())
    else:
        _print(scored)


def _check(args: argparse.Namespace) -> None:
    if args.tasks is None and args.out is not None:
        raise UserError("--out: only with --tasks, whose items it takes")
    if args.tasks is None and args.seed is not None:
        raise UserError("--seed: only with --tasks, whose items it draws")
    if args.tasks is not None and args.tasks < 1:
        raise UserError(f"--tasks {args.tasks}: ask for at least 1")
    if args.tasks is not None and args.quant_experts:
        raise UserError("--quant-experts: scores the whole validation split; drop --tasks")


def _score_tasks(args: argparse.Namespace, model: Any, corpus: Corpus, batch_size: int) -> None:
    from nano_moe.tasks.harness import write_tasks
    from nano_moe.tasks.items import make_tasks
    from nano_moe.tasks.score import score

    context, seed = model.config.context, args.seed or 0
    tasks = make_tasks(corpus, context=context, seed=seed, n=args.tasks)
    if args.out is not None:
        names = write_tasks(Path(args.out), tasks)
        print(f"{args.out}: {', '.join(names)}", file=sys.stderr)
    scored = score(model, corpus.tokenizer, tasks, batch_size=batch_size)
    if args.json:
        print_json(scored)
        return
    rows = [("bits per byte", figure(scored["bits_per_byte"]), f"{len(tasks.passages):,}")]
    pairs = scored["pairs"] or {"kinds": {}}
    if pairs["kinds"]:
        rows.append(("pairs: accuracy", figure(pairs["accuracy"], 3), f"{pairs['n']:,}"))
    for kind, found in pairs["kinds"].items():
        rows.append((f"pairs, {kind}: accuracy", figure(found["accuracy"], 3), f"{found['n']:,}"))
    if scored["cloze"]:
        for name, unit, digits in (("accuracy", "", 3), ("perplexity", " of a word", 2)):
            value = figure(scored["cloze"][name], digits)
            rows.append((f"cloze: {name}{unit}", value, f"{scored['cloze']['n']:,}"))
    print_table(f"tasks of the validation text (seed {seed})", ("", "value", "items"), rows)


def _score_quantized(args: argparse.Namespace, model: Any, corpus: Corpus, batch_size: int) -> None:
    """In fp32 whatever the run trained in, so that nothing but the experts differs."""
    from nano_moe.evaluation import evaluate
    from nano_moe.export.quantized import WIDTHS, stored_bytes, with_quantized_experts

    scored, stored = {}, {}
    for quant in ("fp32", *WIDTHS):
        print(f"experts in {quant} …", file=sys.stderr)
        rounded = model if quant == "fp32" else with_quantized_experts(model, quant)
        scored[quant] = evaluate(rounded, corpus, batch_size=batch_size, precision="fp32")
        stored[quant] = stored_bytes(model, quant)
    if args.json:
        weighs = {q: {"stored_bytes": one._asdict()} for q, one in stored.items()}
        print_json({q: {**one.as_json(), **weighs[q]} for q, one in scored.items()})
        return
    _print_quantized(scored, stored, [f"{WIDTHS[q]} ({q})" for q in WIDTHS])


def _print_quantized(
    scored: dict[str, Evaluation], stored: dict[str, Stored], names: list[str]
) -> None:
    """By domain, CE in fp32 and in each smaller width with what that adds; and bytes."""
    ces = [
        {**{domain: score.ce for domain, score in one.domains.items()}, "all": one.overall.ce}
        for one in scored.values()
    ]
    rows = []
    for domain, before in ces[0].items():
        added = [(figure(ce[domain]), f"{ce[domain] - before:+.4f}") for ce in ces[1:]]
        rows.append((domain, figure(before), *(cell for pair in added for cell in pair)))
    heads = [head for name in names for head in (name, "change")]
    print_table("validation CE (nats) by the width of experts", ("domain", "fp32", *heads), rows)
    sizes = [
        ("experts", *(size(one.experts) for one in stored.values())),
        ("all weights", *(size(one.all) for one in stored.values())),
    ]
    print_table("stored", ("", "fp32", *names), sizes)


def _print(scored: Evaluation) -> None:
    scores = [*scored.domains.items(), ("all", scored.overall)]
    rows = [
        (name, figure(s.ce), figure(s.bpb), figure(s.as_json()["perplexity"], 2), f"{s.tokens:,}")
        for name, s in scores
    ]
    print_table("validation", ("domain", "CE (nats)", "bits/byte", "perplexity", "tokens"), rows)
    if scored.routing:
        names = tuple(name for name in scored.routing[0] if name not in LISTED)
        routing = [
            (str(row["layer"]), *(figure(row[name], 3) for name in names)) for row in scored.routing
        ]
        heads = tuple(name.replace("_", "\n") for name in names)
        print_table(
            "routing (README.md, Reading a run, says what is what)", ("layer", *heads), routing
        )
