"""A corpus of sentences, some in French, and a model of its context."""

from __future__ import annotations

import random

import pytest

from nano_moe.config import DataConfig
from nano_moe.text.store import Corpus, prepare

SUBJECTS = ("The fox", "A hen", "The old man", "This dog", "Nobody here", "The small child")
VERBS = ("was", "has", "is", "sees", "wants", "follows")
OBJECTS = ("near the river", "in a quiet garden", "under the old stones", "with him at night")


def story(rng: random.Random, n: int) -> str:
    def sentence() -> str:
        return " ".join((rng.choice(SUBJECTS), rng.choice(VERBS), *rng.sample(OBJECTS, 2))) + "."

    return " ".join(sentence() for _ in range(n)) + "\n"


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two domains of such sentences; a context of 96 bytes is shorter than a passage."""
    root, rng = tmp_path_factory.mktemp("stories"), random.Random(0)
    for name in ("tales", "tales_fr"):
        (root / name).mkdir()
        for i in range(8):
            (root / name / f"{i}.txt").write_text(story(rng, 40))
    data = DataConfig(
        files=(str(root / "tales"), str(root / "tales_fr")),
        tokenizer="byte",
        val_fraction=0.4,
        cache=str(root / "cache"),
    )
    return prepare(data, 264, 96, progress=False)
