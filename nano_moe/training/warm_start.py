"""Start a sparse run from a dense one's weights (`model.moe.init_from`)."""

from __future__ import annotations

from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT
from nano_moe.model.upcycle import upcycle
from nano_moe.runs import Run, find, first_difference, load_model

FIELD = "model.moe.init_from"


def warm_start(model: GPT, recipe: Recipe, run: Run) -> None:
    """Fill `model` from the dense run that the recipe names, if it names one; raises UserError.

    The dense run must have the recipe's shape, but for its `moe` block, and `run`'s vocabulary.
    """
    if recipe.model.moe is None or recipe.model.moe.init_from is None:
        return
    source = find(recipe.model.moe.init_from)
    if source.tokenizer_file.read_bytes() != run.tokenizer_file.read_bytes():
        raise UserError(
            f"{FIELD}: {source.path} was trained with another vocabulary; "
            "use the same data section, or train it anew on this text"
        )
    dense_recipe, dense, _ = load_model(source)
    if dense_recipe.model.moe is not None:
        raise UserError(f"{FIELD}: {source.path} is sparse itself; name a dense run")
    theirs, ours = (
        config.model_dump(exclude={"moe", "init_std"})
        for config in (dense_recipe.model, recipe.model)
    )
    differs = first_difference(theirs, ours)
    if differs is not None:
        raise UserError(
            f"{FIELD}: model.{differs} is {_value(theirs, differs)} in {source.path} and "
            f"{_value(ours, differs)} here; make them equal"
        )
    upcycle(model, dense)


def _value(tree: dict, dotted: str) -> object:
    for key in dotted.split("."):
        tree = tree[key]
    return tree
