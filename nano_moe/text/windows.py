"""Windows over tokens: shuffled ones to train on, and all tokens in order to evaluate on.

Legend: T context, n windows in an epoch. A training window is a pure function of (seed, index):
it needs no state to resume from, and any worker can make it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nano_moe.text.store import Split


class TrainWindows:
    """Sample `index` -> T+1 tokens: T inputs, and the same shifted by one as targets.

    An epoch visits n non-overlapping windows, each once, in an order and from an offset below T
    that its number and the seed decide. Samples go on without end: epoch = index // n.
    Raises ValueError when there are fewer than T+1 tokens.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int):
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} tokens are fewer than one window of {context + 1}")
        self.tokens = tokens
        self.context = context
        self.seed = seed
        self.n_per_epoch = max(1, (len(tokens) - context) // context)
        self._epoch = -1
        self._offset = 0
        self._order = np.empty(0, np.int64)

    def __getitem__(self, index: int) -> np.ndarray:
        """(T+1,) int64."""
        if index < 0:
            raise IndexError(f"sample {index}: there is none before the first")
        epoch, position = divmod(int(index), self.n_per_epoch)
        if epoch != self._epoch:
            self._offset, self._order = self._shuffle(epoch)
            self._epoch = epoch
        start = self._offset + int(self._order[position]) * self.context
        return np.asarray(self.tokens[start : start + self.context + 1], np.int64)

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
        """The epoch's offset and order, from raw PCG64 draws, which numpy never changes."""
        draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        offset = int(draws.random_raw()) % self.context
        order = np.argsort(draws.random_raw(self.n_per_epoch), kind="stable")
        return (offset if len(self.tokens) >= 2 * self.context else 0), order


class EvalWindows:
    """The whole split in order: every token is the target of exactly one position.

    Window i predicts tokens i*T to (i+1)*T, the last window what is left; its first input is the
    token before, and before the first token the end token stands.
    """

    def __init__(self, split: Split, context: int, end_id: int):
        self.split = split
        self.context = context
        self.end_id = end_id

    def __len__(self) -> int:
        return -(-len(self.split) // self.context)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, domain ids of the targets), each (T,) int64, the last one shorter."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        lo = i * self.context
        hi = min(lo + self.context, len(self.split))
        targets = np.asarray(self.split.tokens[lo:hi], np.int64)
        before = self.split.tokens[lo - 1] if lo else self.end_id
        inputs = np.concatenate(([before], targets[:-1])).astype(np.int64)
        return inputs, targets, self.split.domains_of_tokens(lo, hi)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return (self[i] for i in range(len(self)))
