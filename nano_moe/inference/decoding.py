"""Decoding with a cache: each token of each row is read once.

Shapes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nano_moe.inference.step import Step, fits
from nano_moe.model.cache import Cache
from nano_moe.model.gpt import GPT


class Decoding:
    """Rows of tokens, of any lengths, that grow together.

    The model is in eval mode. A row that fills the context is read again from its later half. Where
    a `Step` fits when rows are read, it takes over from there.
    """

    def __init__(self, model: GPT, rows: Sequence[Sequence[int]]):
        self.model = model
        self.device = next(model.parameters()).device
        self._windows = [list(row[-model.config.context :]) for row in rows]
        self._cache: Cache | None = None
        self._step: Step | None = None

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Of the token after each row, (B, V)."""
        full = any(len(window) > self.model.config.context for window in self._windows)
        if self._cache is None or full:
            return self._read_all()
        last = [window[-1] for window in self._windows]
        if self._step is not None:
            logits = self._step(last, self._cache)
        else:
            column = torch.tensor(last, device=self.device).unsqueeze(-1)  # (B, 1)
            logits = self.model(column, self._cache)[0][:, -1]
        self._cache.keep()
        return logits

    def _read_all(self) -> Tensor:
        context = self.model.config.context
        half = max(1, context // 2)
        self._windows = [w if len(w) <= context else w[-half:] for w in self._windows]
        lengths = torch.tensor([len(window) for window in self._windows], device=self.device)
        tokens = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        for row, window in enumerate(self._windows):
            tokens[row, : len(window)] = torch.tensor(window)
        self._cache = Cache(self.model.config, len(lengths), self.device)
        logits = self.model(tokens.to(self.device), self._cache)[0]  # (B, T, V)
        self._cache.keep(lengths)
        self._step = Step(self.model) if fits(self.model, len(lengths)) else None
        return logits[torch.arange(len(lengths)), lengths - 1]

    def append(self, tokens: Sequence[int], stays: Sequence[bool]) -> None:
        """Add a token to every row, and go on with those rows that stay."""
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        if not all(stays):
            kept = [number for number, stay in enumerate(stays) if stay]
            self._windows = [self._windows[number] for number in kept]
            if self._cache is not None:
                self._cache.select(kept)
