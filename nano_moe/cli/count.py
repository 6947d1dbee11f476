"""`count RECIPE`: what a recipe or a published model costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nano_moe import accounting, recipe_file
from nano_moe.accounting import Sparsity
from nano_moe.cli.arguments import add_json, add_recipe
from nano_moe.cli.output import params, print_count, print_json, print_table, si, size
from nano_moe.config import Recipe
from nano_moe.published import Published

if TYPE_CHECKING:
    from nano_moe.census import Census

HOW = {
    "built": "counted from our decoder's own modules, built without memory; the formula agrees",
    "formula": "counted by formula, from the list of weights: our decoder cannot be this model",
}


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    loaded = recipe_file.load_any(args.recipe, args.overrides)
    if isinstance(loaded, Recipe):
        _count_recipe(args, loaded)
    else:
        _count_published(args, loaded)


def _count_recipe(args: argparse.Namespace, recipe: Recipe) -> None:
    counted, sparsity = accounting.count(recipe), None
    if recipe.model.moe is not None:
        groups = accounting.weight_groups(recipe.model)
        sparsity = accounting.sparsity(groups, recipe.model.moe.n_experts)
    if args.json:
        print_json({**counted._asdict(), "sparsity": sparsity and sparsity._asdict()})
        return
    print_count(args.recipe, counted)
    if sparsity is not None:
        _print_sparsity(sparsity, counted.total_params)


def _count_published(args: argparse.Namespace, published: Published) -> None:
    from nano_moe.census import census

    counted = census(published)
    if args.json:
        print_json(_as_json(published, counted))
        return
    _print_sizes(args.recipe, published, counted)
    if counted.sparsity is not None:
        _print_sparsity(counted.sparsity, counted.total_params)


def _as_json(published: Published, counted: Census) -> dict[str, Any]:
    about = published.published
    return {
        "published": about and about.model_dump(),
        **counted._asdict(),
        "sparsity": counted.sparsity and counted.sparsity._asdict(),
    }


def _print_sizes(path: str, published: Published, counted: Census) -> None:
    about = published.published
    rows = [("parameters", f"{counted.total_params:,}", f"{counted.active_params:,}")]
    if about is not None:
        total, active = ("–" if n is None else f"{n:,g}B" for n in (about.total, about.active))
        rows.append(("as its source rounds them", total, active))
    for precision, held in counted.weight_bytes.items():
        rows.append((f"weights in {precision}", size(held), size(counted.active_bytes[precision])))
    title = path if about is None else f"{about.name} ({about.source})"
    if about is not None and about.rumour:
        print(f"RUMOUR: nobody who built {about.name} has confirmed any of these figures.")
    print_table(title, ("", "all", "active per token"), rows)
    print(f"{HOW[counted.by]}.")
    if about is not None and about.note is not None:
        print(f"Note: {about.note}.")
    if counted.kv_cache_bytes_per_token is not None:
        print(f"KV cache in bf16: {size(counted.kv_cache_bytes_per_token)} per token.")


def _print_sparsity(s: Sparsity, total: int) -> None:
    """The figures that articles quote, each a line of plain words."""
    print(
        f"Compute saved: {si(s.flops_per_token)}FLOP per token and not the "
        f"{si(s.dense_flops_per_token)}FLOP of a dense model as large, {s.compute_saved:.1f} times "
        "less (products with weights, forward).\n"
        f"Memory not saved: a token uses {s.active_share:.1%} of the weights, but any token may "
        f"need any expert, so all {params(total)} must be held.\n"
        f"{s.n_experts} experts are not {s.n_experts} models: {s.n_experts} x "
        f"{params(s.one_expert_params)}, the size with one expert, is "
        f"{params(s.all_models_params)}, and this is {params(total)}: the "
        f"{params(s.outside_params)} outside the experts are stored once."
    )
