"""The page as a file that stands alone: every document in it, nothing to be fetched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nano_moe.errors import UserError
from nano_moe.explorer import page
from nano_moe.explorer.contract import Continuation, Settings
from nano_moe.explorer.documents import finder, finish
from nano_moe.explorer.opened import Opened, overview
from nano_moe.explorer.passages import LONGEST

SAMPLE: Settings = {"tokens": 120, "temperature": 0.8, "top_p": 0.95, "seed": 0}
MOST, NUMBERS = 3, 400_000  # passages of a domain; probabilities in those of a run, about


def report(opened: Sequence[Opened], each: int | None = None) -> str:
    """The page with all documents of some runs, `each` passages per domain (omitted: what fits)."""
    documents: dict[str, Any] = {"overview": overview(opened, live=False)}
    for run, one in enumerate(opened):
        for name in ("compute", "balance", "specialization"):
            documents[f"runs/{run}/{name}"] = _document(opened, f"runs/{run}/{name}")
        documents |= _passages(opened, run, each)
        documents[f"runs/{run}/generation"] = _generation(one)
    return page.html(documents, live=False)


def check_out(path: Path) -> None:
    """Raises UserError where the page could not be written, or would replace another file."""
    if path.exists():
        if not _is_ours(path):
            raise UserError(f"--out {path}: exists and is no page of ours; name another file")
        return
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {path}: {folder} is no folder to write in; name another file")


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return page.MARK in file.read(4096)
    except (OSError, ValueError):
        return False


def _document(opened: Sequence[Opened], key: str) -> Any:
    make = finder(opened, key)
    assert make is not None, key
    try:
        return finish(make())
    except UserError as error:
        return {"error": str(error)}


def _passages(opened: Sequence[Opened], run: int, each: int | None) -> dict[str, Any]:
    """The domains, and some passages of each."""
    listed = _document(opened, f"runs/{run}/passages")
    if "error" in listed:
        return {f"runs/{run}/passages": listed}
    if each is None:
        model = opened[run].recipe.model
        n_experts = 0 if model.moe is None else model.moe.n_experts
        numbers = len(listed["domains"]) * LONGEST * model.n_layers * n_experts
        each = max(1, min(MOST, NUMBERS // (numbers or 1)))
    found: dict[str, Any] = {f"runs/{run}/passages": {**listed, "each": each}}
    for domain in listed["domains"]:
        for number in range(each):
            key = f"runs/{run}/passages/{domain['number']}/{number}"
            found[key] = _document(opened, key)
    return found


def _generation(one: Opened) -> Continuation | dict[str, str]:
    prompt = one.recipe.trainer.sample_prompt
    try:
        steps = list(one.generate(prompt, SAMPLE))
        return {"settings": SAMPLE, "prompt": one.route(prompt), "steps": steps}
    except UserError as error:
        return {"error": str(error)}
