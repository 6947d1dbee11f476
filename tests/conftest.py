"""Tiny models, recipes and text that all rooms' tests share, as factories.

The defaults are small, but nothing in them is equal by accident: D, F, heads, context and
vocabulary are all different numbers, and attention is grouped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from nano_moe.bench.file_cache import check_can_be_emptied
from nano_moe.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, Recipe, TrainerConfig
from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.text.store import Corpus, prepare

settings.register_profile("nano_moe", deadline=None, derandomize=True)
settings.load_profile("nano_moe")


LONGEST = "test_char.py"  # takes half as long as all of `make test-all`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that none of these is begun last, beside idle cores."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path not in slow))


TINY = {
    "vocab_size": 264,  # the byte tokenizer's 257, rounded up
    "context": 12,
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 32,
    "init_std": 0.2,  # large, so that outputs and gradients are far from rounding errors
}
TINY_MOE = {"n_experts": 4, "top_k": 2}  # F = d_ff / 2 = 16


@pytest.fixture(scope="session")
def dense_config() -> Callable[..., ModelConfig]:
    """dense_config(**model fields) -> ModelConfig of a tiny dense decoder."""
    return lambda **fields: ModelConfig(**{**TINY, **fields})


@pytest.fixture(scope="session")
def moe_config() -> Callable[..., ModelConfig]:
    """moe_config(moe={fields}, **model fields) -> ModelConfig of a tiny sparse decoder."""

    def make(moe: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
        return ModelConfig(**{**TINY, **fields}, moe=MoEConfig(**{**TINY_MOE, **(moe or {})}))

    return make


@pytest.fixture
def on_disk(tmp_path) -> Path:
    """The test's folder, where reading can be from disk alone; else the test is skipped."""
    try:
        check_can_be_emptied(tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    return tmp_path


@pytest.fixture(scope="session")
def build() -> Callable[..., GPT]:
    """build(config, seed=0) -> an initialised GPT."""
    return lambda config, seed=0: init_weights(GPT(config), seed)


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Recipe]:
    """recipe_of(model, optim={fields}, trainer={fields}, data={fields}) -> Recipe."""

    def make(
        model: ModelConfig,
        optim: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> Recipe:
        return Recipe(
            model=model,
            data=DataConfig(**(data or {})),
            optim=OptimConfig(**{"lr": 0.01, **(optim or {})}),
            trainer=TrainerConfig(
                **{"steps": 4, "batch_size": 2, "precision": "fp32", **(trainer or {})}
            ),
        )

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 12) seeded tokens of the tiny vocabulary."""
    return torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two domains of bytes; the validation split is no multiple of the tiny context."""
    root = tmp_path_factory.mktemp("corpus")
    for name, word in (("sea", "wave"), ("land", "stone")):
        (root / name).mkdir()
        for i in range(6):
            text = " ".join(f"{word} {i * j % 17}" for j in range(30 + 7 * i))
            (root / name / f"{i}.txt").write_text(text + "\n")
    data = DataConfig(
        files=(str(root / "sea"), str(root / "land")),
        tokenizer="byte",
        val_fraction=0.2,
        cache=str(root / "cache"),
    )
    corpus = prepare(data, TINY["vocab_size"], TINY["context"], progress=False)
    assert len(corpus.val) % TINY["context"], "the last evaluation window must be a short one"
    return corpus
