"""Batches of training windows, as a pure function of how many samples were consumed.

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nano_moe import ranks
from nano_moe.config import Recipe
from nano_moe.text.store import Corpus
from nano_moe.text.windows import TrainWindows


class Windows(Dataset[Tensor]):
    """Sample i is always the same T + 1 tokens for one seed, however often training was resumed."""

    def __init__(self, corpus: Corpus, recipe: Recipe):
        self.windows = TrainWindows(corpus.train.tokens, recipe.model.context, recipe.seed)
        trainer = recipe.trainer
        self.length = trainer.steps * trainer.accumulate * trainer.batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:  # (T + 1,)
        return torch.from_numpy(self.windows[index])


class From(Sampler[int]):
    """Of each batch from `start` on, in order, the part of this process.

    Its length stays that of the whole training. Process r of R takes the r-th R-th of every batch.
    """

    def __init__(self, length: int, start: int, batch_size: int):
        self.length, self.start, self.batch_size = length, start, batch_size
        self.own = batch_size // ranks.count()

    def __len__(self) -> int:
        return self.length // ranks.count()

    def __iter__(self) -> Iterator[int]:
        for batch in range(self.start, self.length, self.batch_size):
            first = batch + ranks.rank() * self.own
            yield from range(first, first + self.own)


class TokenData(L.LightningDataModule):
    """One pass over `Windows`, begun where the checkpoint's optimizer step left off."""

    def __init__(self, corpus: Corpus, recipe: Recipe):
        super().__init__()
        self.corpus, self.recipe = corpus, recipe
        self.start = 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        dataset = Windows(self.corpus, self.recipe)
        sampler = From(len(dataset), self.start, self.recipe.trainer.batch_size)
        return DataLoader(
            dataset,
            batch_size=sampler.own,
            sampler=sampler,
            generator=torch.Generator(),  # else it draws from the global one, once per resume
        )

    def state_dict(self) -> dict[str, Any]:
        trainer = self.recipe.trainer
        assert self.trainer is not None
        return {"consumed": self.trainer.global_step * trainer.accumulate * trainer.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["consumed"]
