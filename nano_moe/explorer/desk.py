"""Work on open runs, one piece after the other in a thread of its own, each document made once.

One thread, because a model is not for several; pieces, so that a text typed meanwhile is routed
between two of them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from nano_moe.errors import UserError
from nano_moe.explorer.documents import Parts, finder
from nano_moe.explorer.opened import Opened
from nano_moe.explorer.page import dumped

PATIENCE = 5.0  # seconds that the end waits for the piece at hand
ENDED = "the explorer has ended"
Job = Callable[[], None]


class Desk:
    """Takes requests in order; used from the event loop."""

    def __init__(self, opened: Sequence[Opened]):
        self.opened = opened
        self.ended = False  # set it, and what is asked for is refused, what is under way cut short
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._made: dict[str, asyncio.Future[str]] = {}
        self._thread = threading.Thread(target=self._work, name="explorer", daemon=True)
        self._thread.start()

    async def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result, or its error, once its turn has come; UserError at the end."""
        if self.ended:
            raise UserError(ENDED)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(method: Callable[[Any], None], value: Any) -> None:
            if not future.cancelled():
                method(value)

        def job() -> None:
            try:
                outcome = future.set_result, function(*arguments)
            except Exception as error:
                outcome = future.set_exception, error
            loop.call_soon_threadsafe(settle, *outcome)

        self._jobs.put(job)
        return await future

    async def document(self, key: str) -> str | None:
        """A document as JSON, made once however many ask for it; None: there is none."""
        make = finder(self.opened, key)
        if make is None:
            return None
        made = self._made.get(key)
        if made is None or (made.done() and made.exception() is not None):
            made = asyncio.ensure_future(self._make(make))
            if not key[-1].isdigit():  # passages are many, and kept by their run
                self._made[key] = made
        return await asyncio.shield(made)

    def later(self, function: Callable[[], object]) -> None:
        """Do it when its turn comes; nobody waits for it, and its fault shows where it matters."""

        def job() -> None:
            try:
                function()
            except Exception:
                pass

        self._jobs.put(job)

    def close(self) -> None:
        """Take no more; wait a moment for the piece at hand."""
        self.ended = True
        while not self._jobs.empty():
            self._jobs.get()
        self._jobs.put(None)
        self._thread.join(PATIENCE)

    async def _make(self, make: Callable[[], Parts]) -> str:
        parts = await self.do(make)
        while True:
            document = await self.do(_advance, parts)
            if document is not None:
                return document

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _advance(parts: Parts) -> str | None:
    """Do one part of the work; the document as JSON after the last."""
    try:
        next(parts)
    except StopIteration as end:
        return dumped(end.value)
    return None
