"""What a decoder remembers of tokens it has read, so that it reads each once.

Rows may have different lengths. A key's place is its position, so what padding wrote past a row's
end is overwritten before any of its queries can see it, and causality alone hides it.

Shapes: B rows, n new positions, S positions held (the longest row's), C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nano_moe.config import ModelConfig


class Cache:
    """Per layer, tensors by name with a row per prompt, grown as tokens come.

    `read` is told of the tokens before a forward pass, `keep` after it how many of them count.
    """

    def __init__(self, config: ModelConfig, rows: int, device: torch.device | None = None):
        self.context = config.context
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.layers = [LayerCache(self) for _ in range(config.n_layers)]
        self.even, self.start, self.end = True, 0, 0  # whether all rows are equally long

    def read(self, n: int) -> None:
        """Place the next `n` tokens of each row; raises ValueError past the context."""
        self.start = int(self.lengths.max())
        self.end = self.start + n
        if self.end > self.context:
            raise ValueError(f"{self.end} tokens are more than context={self.context}")
        self.even = bool((self.lengths == self.start).all())
        new = torch.arange(n, device=self.lengths.device)
        self.positions = self.lengths[:, None] + new  # (B, n)

    def keep(self, counts: Tensor | None = None) -> None:
        """Count what was read: all of it, or of each row its first `counts` tokens."""
        n = self.positions.shape[1]
        self.lengths = self.lengths + (n if counts is None else counts)

    def select(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        at = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        self.lengths = self.lengths[at]
        for layer in self.layers:
            layer.held = {name: held[at] for name, held in layer.held.items()}

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation angles of the new positions: (T, C) to (n, C), or (B, 1, n, C) if uneven."""
        if self.even:
            return cos[self.start : self.end], sin[self.start : self.end]
        return cos[self.positions].unsqueeze(1), sin[self.positions].unsqueeze(1)

    @property
    def is_first(self) -> bool:
        """Whether nothing was held before, so that new tokens see each other alone."""
        return self.start == 0

    def mask(self) -> Tensor | None:
        """Which held positions each new one sees, (B, 1, n, S); None: all of them."""
        if self.even and self.positions.shape[1] == 1:
            return None
        places = torch.arange(self.end, device=self.lengths.device)
        return places <= self.positions[:, None, :, None]


class LayerCache:
    """One layer's part of a `Cache`."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.held: dict[str, Tensor] = {}

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Write (B, ..., n, C) at the new positions; all that is held, (B, ..., S, C)."""
        cache = self.cache
        room = self.held.get(name)
        if room is None or room.shape[-2] < cache.end:
            room = self._grown(name, new, room)
        if cache.even:
            room[..., cache.start : cache.end, :] = new
        else:
            by_row = cache.positions.view(len(new), *[1] * (new.dim() - 3), -1, 1)
            room.scatter_(-2, by_row.expand_as(new), new)
        return room[..., : cache.end, :]

    def _grown(self, name: str, new: Tensor, old: Tensor | None) -> Tensor:
        """Room for twice as many positions, up to the context."""
        size = min(max(2 * self.cache.end, 64), self.cache.context)
        room = new.new_zeros(*new.shape[:-2], size, new.shape[-1])
        if old is not None:
            room[..., : old.shape[-2], :] = old
        self.held[name] = room
        return room
