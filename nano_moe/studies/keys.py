"""What makes two runs the same run, so that none is trained twice."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import nano_moe
from nano_moe.config import Recipe
from nano_moe.device import choose_device

PACKAGE = Path(nano_moe.__file__).parent
SOURCES = ("model", "training", "text")  # what decides a trained weight


def run_key(
    recipe: Recipe,
    corpus: str | None,
    threads: int,
    *,
    measure: bool = False,
    watch: bool = False,
    expert_budget: str | None = None,
    expert_ranks: int | None = None,
) -> str:
    """A hash of the resolved recipe, the corpus, the sources, the threads and the kind of device.

    `corpus` is its sha256; where text and tokens lie on disk does not matter. A watched run, whose
    weights are the same, leaves more behind.
    """
    text = {"files", "cache"}
    decides: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", exclude={"data": text}),
        "corpus": corpus,
        "sources": sources(),
        "threads": threads,
        "device": choose_device(recipe).type,
        "measure": measure,
        **({"watch": True} if watch else {}),
        **({"expert_budget": expert_budget} if expert_budget else {}),
        **({"expert_ranks": expert_ranks} if expert_ranks else {}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def sources() -> str:
    """The sha256 of all Python files of the rooms that decide a trained weight, by name."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for file in sorted((PACKAGE / room).rglob("*.py")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(PACKAGE).as_posix()} {content}\n".encode())
    return digest.hexdigest()
