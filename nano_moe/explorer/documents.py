"""The documents of `contract.py` by their keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Any

from nano_moe.explorer.opened import Opened

Parts = Generator[None, None, Any]  # work that pauses, and comes to a document
KEY = re.compile(r"runs/(\d{1,3})/(\w+)((?:/\d{1,4}){0,2})")


def finder(opened: Sequence[Opened], key: str) -> Callable[[], Parts] | None:
    """What makes the document of that key, in parts; None where there is no such document."""
    match = KEY.fullmatch(key)
    if match is None or int(match[1]) >= len(opened):
        return None
    one, numbers = opened[int(match[1])], [int(n) for n in match[3].split("/")[1:]]
    if numbers:
        if match[2] != "passages" or len(numbers) != 2:
            return None
        return lambda: _whole(lambda: one.passage(*numbers))
    if match[2] == "specialization":
        return one.specialization
    whole: dict[str, Callable[[], Any]] = {
        "compute": one.compute,
        "balance": one.balance,
        "passages": one.passages,
    }
    make = whole.get(match[2])
    return None if make is None else lambda: _whole(make)


def finish(parts: Parts) -> Any:
    """The document, at once."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def _whole(make: Callable[[], Any]) -> Parts:
    yield from ()
    return make()
