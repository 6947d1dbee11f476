"""Checkpoints read back: whole ones of ours alone, and never anything but tensors unpickled."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.files import is_damaged, replacing
from nano_moe.runs import SCHEMA, Run

if TYPE_CHECKING:
    from nano_moe.model.gpt import GPT

log = logging.getLogger("nano_moe")


class DamagedCheckpoint(UserError):
    """A checkpoint that is missing or not what was written; another one of the run may be whole."""


class Found(NamedTuple):
    """A whole checkpoint: its file, its content, and what was passed over for it, in one line."""

    path: Path
    content: dict[str, Any]
    warning: str | None


def read_checkpoint(
    path: Path, map_location: str = "cpu", *, mapped: bool = False
) -> dict[str, Any]:
    """A checkpoint of ours, unpickled with `weights_only=True` alone; raises UserError.

    `mapped`: its tensors stay in the file, and what is read of them may leave memory at any time.
    """
    import torch

    if not path.is_file():
        raise DamagedCheckpoint(f"{path}: no such checkpoint; the run may not have saved one yet")
    if is_damaged(path):
        raise DamagedCheckpoint(
            f"{path}: damaged (not the bytes that its checksum was made of); "
            "use another checkpoint of the run"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on foreign files torch also warns
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for truncated or foreign files
        reason = (str(error).splitlines() or ["unreadable"])[0].split(". ")[0][:120]
        raise DamagedCheckpoint(
            f"{path}: not a readable checkpoint ({reason}); it is truncated or foreign, "
            "use another checkpoint of the run"
        ) from error
    check_schema(checkpoint, path)
    return checkpoint


def first_whole(paths: Sequence[Path], map_location: str = "cpu", *, mapped: bool = False) -> Found:
    """The first of these checkpoints that is not damaged; raises UserError where none is whole."""
    faults: list[DamagedCheckpoint] = []
    for path in paths:
        try:
            content = read_checkpoint(path, map_location, mapped=mapped)
        except DamagedCheckpoint as error:
            faults.append(error)
            continue
        step, passed = content["global_step"], [str(f).rsplit("; ", 1)[0] for f in faults]
        warning = f"{'; '.join(passed)}; taking {path.name} of step {step}" if passed else None
        return Found(path, content, warning)
    others = [path.name for path in paths[1:] if path.is_file()]
    if not others:
        raise faults[0]
    told = f"{str(faults[0]).rsplit('; ', 1)[0]}; {' and '.join(others)} cannot be read either"
    recipe = paths[0].with_name("recipe.yaml")
    raise DamagedCheckpoint(f"{told}, so begin anew: make train RECIPE={recipe}")


def newest(run: Run) -> Found:
    """The checkpoint to go on from; raises UserError."""
    return first_whole([run.last, run.previous])


def check_schema(checkpoint: Any, path: Path) -> None:
    """Raises UserError for a foreign checkpoint or one written by a newer version."""
    ours = checkpoint.get("nano_moe") if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("schema"), int):
        raise UserError(f"{path}: a checkpoint, but not one of nano_moe; give a run of this kit")
    state, step = checkpoint.get("state_dict"), checkpoint.get("global_step")
    whole = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not whole or not isinstance(step, int) or ours["schema"] < 1:
        raise DamagedCheckpoint(f"{path}: a checkpoint without weights or step; it is damaged")
    if ours["schema"] > SCHEMA:
        raise UserError(
            f"{path}: written with checkpoint schema {ours['schema']}, this version reads up to "
            f"{SCHEMA}; update nano_moe"
        )


def load_model(run: Run, *, device: str = "cpu") -> tuple[Recipe, GPT, int]:
    """Recipe, trained decoder in eval mode, and the step it was saved at; raises UserError."""
    from nano_moe.model.gpt import GPT

    recipe = run.recipe()
    model = GPT(recipe.model)
    step = fill(model, run, device)
    return recipe, model.to(device).eval(), step


def fill(model: GPT, run: Run, device: str = "cpu", *, mapped: bool = False) -> int:
    """Give a decoder the run's weights, of best.ckpt if there is; the step they were saved at.

    `mapped`: it takes the file's own tensors, which are not to be written. A damaged checkpoint is
    passed over with a warning where there is a whole one; raises UserError where there is none.
    """
    path, checkpoint, warning = first_whole(run.weights or [run.last], device, mapped=mapped)
    if warning is not None:
        log.warning(warning)
    state = {
        key.removeprefix("model."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("model.")
    }
    try:
        model.load_state_dict(state, assign=mapped)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{path}: its weights do not fit {run.recipe_file} ({fault[:160]}); "
            "one of the two was changed"
        ) from error
    return int(checkpoint["global_step"])


def write_weights(path: Path, recipe: Recipe, model: GPT, step: int = 0) -> None:
    """A checkpoint of a decoder's weights alone; training on from it is to begin anew.

    Raises OSError where the disk is full; what was there is then untouched.
    """
    import torch

    checkpoint = {
        "nano_moe": {"schema": SCHEMA, "recipe": recipe.model_dump()},
        "state_dict": {f"model.{name}": weight for name, weight in model.state_dict().items()},
        "global_step": step,
    }
    try:
        with replacing(path, sealed=True) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # as torch reports a full disk
        raise OSError(errno.ENOSPC, "the disk may be full", str(path)) from error
