"""Seconds of training alone: validation, checkpoints and pauses between sessions left out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up the time between `start` and `read`, less what ran under `paused`."""

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running

    def set(self, seconds: float) -> None:
        self._before = seconds
        if self._since is not None:
            self.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._before, running = self.read(), self._since is not None
        self._since = None
        try:
            yield
        finally:
            if running:
                self.start()
