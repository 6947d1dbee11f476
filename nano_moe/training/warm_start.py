"""Start from weights: imported ones, or a dense run's for a sparse one (`model.moe.init_from`)."""

from __future__ import annotations

import logging
from typing import Any

from nano_moe import ranks
from nano_moe.accounting import count
from nano_moe.checkpoints import load_model
from nano_moe.config import ModelConfig, Recipe
from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT
from nano_moe.model.upcycle import upcycle
from nano_moe.runs import Run, first_difference, source_of, write_json

log = logging.getLogger(__name__)
FIELD = "model.moe.init_from"


def warm_start(model: GPT, recipe: Recipe, run: Run) -> None:
    """Fill `model` from weights that `run` imported, or from the dense run that the recipe names.

    Raises UserError. The dense run must have the recipe's shape, but for its `moe` block, and
    `run`'s vocabulary. What was taken of it, and what it had cost, goes into `run`'s manifest.
    """
    if run.is_untrained_import:
        imported = load_model(run)[1]
        _check_finite(imported, f"{run.best}: its weights", "import others")
        model.load_state_dict(imported.state_dict())
        return
    source = source_of(recipe)
    if source is None:
        return
    dense_recipe, dense, step = load_model(source)
    _check_fits(source, run, dense_recipe, recipe)
    _check_finite(dense, f"{FIELD}: weights of {source.path}", "name another run")
    if source.manifest().get("corpus", {}).get("sha256") != run.manifest()["corpus"]["sha256"]:
        log.warning(f"{FIELD}: {source.path} may have been trained on what is validation text here")
    if dense_recipe.seed == recipe.seed:
        log.warning(f"{FIELD}: {source.path} has this seed, so its batches are seen a second time")
    upcycle(model, dense)
    tokens = step * dense_recipe.tokens_per_step
    spent = {"run": source.name, "step": step, "tokens": tokens}
    spent["flops"] = tokens * count(dense_recipe).train_flops_per_token
    if ranks.leads():
        write_json(run.manifest_file, run.manifest() | {"init_from": spent})


def _check_finite(model: GPT, what: str, remedy: str) -> None:
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{what} are not finite; {remedy}")


def _check_fits(source: Run, run: Run, dense: Recipe, recipe: Recipe) -> None:
    theirs = source.tokenizer_file
    if not theirs.is_file() or theirs.read_bytes() != run.tokenizer_file.read_bytes():
        raise UserError(
            f"{FIELD}: {source.path} was trained with another vocabulary; "
            "use the same data section, or train it anew on this text"
        )
    if dense.model.moe is not None:
        raise UserError(f"{FIELD}: {source.path} is sparse itself; name a dense run")
    there, here = _shape(dense.model), _shape(recipe.model)
    differs = first_difference(there, here)
    if differs is not None:
        raise UserError(
            f"{FIELD}: model.{differs} is {_value(there, differs)} in {source.path} and "
            f"{_value(here, differs)} here; make them equal"
        )


def _shape(model: ModelConfig) -> dict[str, Any]:
    """What two models must share to share weights, defaults spelt out."""
    resolved = {"n_kv_heads": model.kv_heads, "head_dim": model.head_size}
    return model.model_dump(exclude={"moe", "init_std"}) | resolved


def _value(tree: dict, dotted: str) -> object:
    for key in dotted.split("."):
        tree = tree[key]
    return tree
