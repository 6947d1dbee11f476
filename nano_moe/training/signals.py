"""Ctrl-C, SIGTERM and a closed terminal end training after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

import lightning as L

from nano_moe import ranks
from nano_moe.launch import STOPS


class StopSignal(L.Callback):
    """Remembers the first signal; a second Ctrl-C stops at once, at the last saved checkpoint."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def received(self) -> bool:
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any process of the training received one; collective.

        One that is received meanwhile counts at the next step.
        """
        number = ranks.largest(self.signal or 0)
        if number:
            self.signal = signal.Signals(number)
        return number != 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installed here because the trainer installs its own handlers just before.

        At the end, however it comes, the trainer puts back what it found before both. What it asks
        the first process before each step is not asked: it would hide that a connection is lost.
        """
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if not ranks.leads():
            return
        try:
            os.write(2, f"\n{self.signal.name}: stopping after this step\n".encode())  # reentrant
        except OSError:  # nobody is there: what else is said must not end the training
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _nothing() -> None:
    """In place of the trainer's own agreement on SIGTERM; ours is `agreed`."""
