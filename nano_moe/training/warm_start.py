"""Start a sparse run from a dense one's weights (`model.moe.init_from`)."""

from __future__ import annotations

from nano_moe.accounting import count
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT
from nano_moe.model.upcycle import upcycle
from nano_moe.runs import Run, find, first_difference, load_model, write_json

FIELD = "model.moe.init_from"


def warm_start(model: GPT, recipe: Recipe, run: Run) -> None:
    """Fill `model` from the dense run that the recipe names, if it names one; raises UserError.

    The dense run must have the recipe's shape, but for its `moe` block, and `run`'s vocabulary.
    What was taken, and what it had cost, goes into `run`'s manifest.
    """
    if recipe.model.moe is None or recipe.model.moe.init_from is None:
        return
    source = find(recipe.model.moe.init_from)
    theirs = source.tokenizer_file
    if not theirs.is_file() or theirs.read_bytes() != run.tokenizer_file.read_bytes():
        raise UserError(
            f"{FIELD}: {source.path} was trained with another vocabulary; "
            "use the same data section, or train it anew on this text"
        )
    dense_recipe, dense, step = load_model(source)
    if dense_recipe.model.moe is not None:
        raise UserError(f"{FIELD}: {source.path} is sparse itself; name a dense run")
    there, here = (
        config.model_dump(exclude={"moe", "init_std"})
        for config in (dense_recipe.model, recipe.model)
    )
    differs = first_difference(there, here)
    if differs is not None:
        raise UserError(
            f"{FIELD}: model.{differs} is {_value(there, differs)} in {source.path} and "
            f"{_value(here, differs)} here; make them equal"
        )
    upcycle(model, dense)
    tokens = step * dense_recipe.tokens_per_step
    spent = {"run": source.name, "step": step, "tokens": tokens}
    spent["flops"] = tokens * count(dense_recipe).train_flops_per_token
    write_json(run.manifest_file, run.manifest() | {"init_from": spent})


def _value(tree: dict, dotted: str) -> object:
    for key in dotted.split("."):
        tree = tree[key]
    return tree
