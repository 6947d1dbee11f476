"""`count RECIPE`: what a recipe or a published model costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nano_moe import accounting, recipe_file
from nano_moe.accounting import BYTES, Sparsity
from nano_moe.cli.arguments import add_json, add_recipe
from nano_moe.cli.output import params, print_count, print_json, print_table, si, size
from nano_moe.config import ModelConfig, Recipe
from nano_moe.errors import UserError
from nano_moe.footprint import compiled_at_most, kept_per_token, peak
from nano_moe.published import Publication, Published

if TYPE_CHECKING:
    from nano_moe.census import Census

A_HANDFUL = 16  # of experts: with more, nobody takes the model for so many models
HOW = {
    "built": "counted from the modules of the decoder that the file describes: shapes, no memory",
    "formula": "counted by formula, from the list of weights: our decoder cannot be this model",
}

MOMENTS = {
    "loss": "at the loss",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer",
}


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="estimate a whole training's memory and hours on one GPU, too",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    loaded = recipe_file.load_any(args.recipe, args.overrides)
    if isinstance(loaded, Recipe):
        _count_recipe(args, loaded)
    elif args.gpu:
        raise UserError(f"count --gpu: {args.recipe} says nothing of a training; drop it")
    else:
        _count_published(args, loaded)


def _count_recipe(args: argparse.Namespace, recipe: Recipe) -> None:
    counted, sparsity = accounting.count(recipe), None
    if recipe.model.moe is not None:
        groups = accounting.weight_groups(recipe.model)
        sparsity = accounting.sparsity(groups, recipe.model.moe.n_experts)
    activations, step = _activations(recipe.model), _step(recipe)
    gpu = _gpu(recipe) if args.gpu else {}
    if args.json:
        print_json(
            {
                **counted._asdict(),
                "activation_bytes_per_token": activations,
                "step": step,
                "sparsity": sparsity and sparsity._asdict(),
                **({"gpu": gpu} if gpu else {}),
            }
        )
        return
    print_count(args.recipe, counted)
    if recipe.trainer.is_parallel:
        print("of one process that holds it all: how trainer shares it out is not counted\n")
    _print_activations(activations)
    _print_step(step)
    if gpu:
        _print_gpu(gpu)
    if sparsity is not None:
        _print_sparsity(sparsity, counted.total_params)


def _activations(model: ModelConfig) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes by precision, by what a block keeps, and by part."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for precision in BYTES:
        found[precision] = {}
        for name, checkpointing in (("all", False), ("checkpointed", True)):
            kept = kept_per_token(model, precision, checkpointing=checkpointing)
            found[precision][name] = {"total": sum(kept), **kept._asdict()}
    return found


def _step(recipe: Recipe) -> dict[str, Any]:
    """The peak as the recipe trains, `auto` counted as fp32."""
    precision = recipe.trainer.precision if recipe.trainer.precision in BYTES else "fp32"
    return {
        "precision": precision,
        **peak(recipe, precision)._asdict(),
        "compiled_bytes_at_most": compiled_at_most(recipe, precision),
    }


def _gpu(recipe: Recipe) -> dict[str, Any]:
    """What a whole training would take on one GPU, in bf16; computed."""
    from nano_moe.studies import tiers

    assumed = {"peak_flops_per_second": tiers.PEAK, "utilisation": tiers.SHARE}
    return {**tiers.cost(recipe)._asdict(), **assumed}


def _count_published(args: argparse.Namespace, published: Published) -> None:
    from nano_moe.census import census

    counted = census(published)
    activations = None if published.model is None else _activations(published.model)
    if args.json:
        print_json({**_as_json(published, counted), "activation_bytes_per_token": activations})
        return
    _print_sizes(args, published, counted)
    if activations is not None:
        _print_activations(activations)
    if counted.sparsity is not None:
        _print_sparsity(counted.sparsity, counted.total_params)


def _as_json(published: Published, counted: Census) -> dict[str, Any]:
    about = published.published
    return {
        "published": about and about.model_dump(),
        **counted._asdict(),
        "sparsity": counted.sparsity and counted.sparsity._asdict(),
    }


def _print_sizes(args: argparse.Namespace, published: Published, counted: Census) -> None:
    about, title = published.published, args.recipe
    if about is not None and not args.overrides:
        title = f"{about.name} ({about.source})"
    elif args.overrides:
        title = f"{title}, changed: {' '.join(args.overrides)}"
    if about is not None and about.rumour:
        print(f"RUMOUR: nobody who built {about.name} has confirmed any of these figures.")
    rows = _size_rows(None if args.overrides else about, counted)
    print_table(title, ("", "all", "used by a token"), rows)
    print(f"{HOW[counted.by]}.")
    if about is not None and about.note is not None:
        print(f"Note: {about.note}.")
    if counted.kv_cache_bytes_per_token is not None:
        print(f"KV cache in bf16: {size(counted.kv_cache_bytes_per_token)} per token.")
    if counted.sparsity is None:
        print("Dense: every token uses every weight.")


def _size_rows(about: Publication | None, counted: Census) -> list[tuple[str, str, str]]:
    """Parameters, as counted, as their source rounds them and by part, and bytes by precision."""
    rows = [("parameters", f"{counted.total_params:,}", f"{counted.active_params:,}")]
    if about is not None:
        total, active = ("–" if n is None else f"{n:,g}B" for n in (about.total, about.active))
        rows.append(("as its source rounds them", total, active))
    for kind, n in counted.params_by_kind.items():
        used = counted.active_by_kind.get(kind, 0)
        rows.append((f"  {kind.replace('_', ' ')}", params(n), params(used)))
    for precision, held in counted.weight_bytes.items():
        rows.append((f"weights in {precision}", size(held), size(counted.active_bytes[precision])))
    return rows


def _print_activations(activations: dict[str, dict[str, dict[str, int]]]) -> None:
    rows = [
        (label, *(size(activations[precision][kept]["total"]) for precision in activations))
        for kept, label in (("all", "in all"), ("checkpointed", "with activation_checkpointing"))
    ]
    title = "activations that training keeps, per token, on a CPU"
    print_table(title, ("", *activations), rows)


def _print_step(step: dict[str, Any]) -> None:
    compiled = step["compiled_bytes_at_most"]
    print(
        f"A training step in {step['precision']} on a CPU holds {size(step['bytes'])} at its "
        f"fullest, {MOMENTS[step['moment']]}: weights, gradients, optimizer state, activations."
    )
    if compiled:
        print(f"Compiled products of experts may take up to {size(compiled)} beside it.")


def _print_gpu(gpu: dict[str, Any]) -> None:
    weights, active = params(gpu["total_params"]), params(gpu["active_params"])
    print(
        f"One GPU, computed and not run by us: {weights} weights, {active} active, "
        f"{si(gpu['tokens'])} tokens, {gpu['flops']:.2e} FLOPs, {size(gpu['memory_bytes'])}, "
        f"{gpu['seconds'] / 3600:.1f} h. The time is FLOPs over {gpu['utilisation']:.0%} of a peak "
        f"of {gpu['peak_flops_per_second'] / 1e12:.0f} TFLOP/s (A100, bf16), the same share for "
        "dense and sparse, a guess; memory is the CPU path's peak in bf16 and wide logits."
    )


def _print_sparsity(s: Sparsity, total: int) -> None:
    """The figures that articles quote, each a line of plain words."""
    outside, one, expert = (
        params(n) for n in (s.outside_params, s.one_expert_params, s.expert_params)
    )
    print(
        f"Compute saved: a token costs {si(s.flops_per_token)}FLOP forward in products with "
        f"weights (attention's scores apart); a dense model of {params(total)} would cost "
        f"{si(s.dense_flops_per_token)}FLOP, {s.compute_saved:.1f} times as much.\n"
        f"Memory not saved: a token uses {s.active_share:.1%} of the weights, but any token may "
        f"need any expert, so all {params(total)} must be held."
    )
    if 2 <= s.n_experts <= A_HANDFUL:
        print(
            f"{s.n_experts} experts are not {s.n_experts} models: {s.n_experts} x {one} = "
            f"{params(s.all_models_params)} would count the {outside} outside the experts "
            f"{s.n_experts} times, and they are stored once."
        )
    print(
        f"The sum: {outside} outside the experts + {s.n_experts} x {expert} = {params(total)}; a "
        f"token uses {outside} + {s.experts_used:g} x {expert} = {params(s.active_share * total)}."
    )
