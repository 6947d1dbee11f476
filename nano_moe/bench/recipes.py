"""The recipes that benchmarks train: the anchor and its sparse twins, on random tokens or words.

Shapes: B batch, T time.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import nano_moe
from nano_moe import recipe_file
from nano_moe.config import Recipe
from nano_moe.text.store import Corpus, prepare

FOLDER = Path(nano_moe.__file__).parent.parent / "recipes"
QUICK = (  # a model of the same making that steps in milliseconds
    "model.vocab_size=512",
    "model.context=16",
    "model.n_layers=1",
    "model.d_model=16",
    "model.n_heads=2",
    "model.d_ff=64",
    "trainer.batch_size=2",
)
# Name -> recipe file and what it changes.
DECODERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("dense.yaml", ()),
    "8 experts top-2": ("mixtral.yaml", ()),
    "64 experts top-8": ("mixtral.yaml", ("model.moe.n_experts=64", "model.moe.top_k=8")),
    "64 experts top-2": ("mixtral.yaml", ("model.moe.n_experts=64",)),
}


def recipe(name: str, *overrides: str, quick: bool) -> Recipe:
    """One of DECODERS, shrunken when quick."""
    file, changes = DECODERS[name]
    return recipe_file.load(FOLDER / file, (*changes, *(QUICK if quick else ()), *overrides))


def prepared(recipe: Recipe) -> Corpus:
    """The recipe's text, tokenized without a progress bar."""
    return prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)


class RandomTokens:
    """Batch `number` is always the same tokens, frequent and rare ones as in text (Zipf)."""

    def __init__(self, recipe: Recipe):
        self.shape = (recipe.trainer.batch_size, recipe.model.context + 1)
        self.odds = 1 / torch.arange(10, 10 + recipe.model.vocab_size)

    def __call__(self, number: int) -> Tensor:  # (B, T + 1)
        generator = torch.Generator().manual_seed(number)
        n_tokens = self.shape[0] * self.shape[1]
        drawn = torch.multinomial(self.odds, n_tokens, replacement=True, generator=generator)
        return drawn.view(self.shape)


@contextlib.contextmanager
def text_folder(n_words: int) -> Iterator[tuple[Path, Sequence[str]]]:
    """A temporary folder with a text of random words, and the overrides that train on it."""
    with tempfile.TemporaryDirectory(prefix="nano-moe-bench-") as name:
        folder = Path(name)
        file = folder / "words.txt"
        file.write_text(random_text(n_words), encoding="utf-8")
        yield folder, text_of(file)


def text_of(file: Path) -> tuple[str, ...]:
    """The overrides that train on a file, its tokens beside it."""
    paths = {"files": file, "cache": file.parent / "data"}
    return tuple(f"data.{field}={json.dumps(str(path))}" for field, path in paths.items())


def random_text(n_words: int) -> str:
    """Made-up words in lines of ten, frequent and rare ones as in text (Zipf)."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(5000)]
    odds = [1 / rank for rank in range(10, 10 + len(words))]
    drawn = chance.choices(words, odds, k=n_words)
    return "\n".join(" ".join(drawn[i : i + 10]) for i in range(0, n_words, 10)) + "\n"
