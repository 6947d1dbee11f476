"""What a study reads from trained weights besides their loss: by the name that its file gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nano_moe.runs import Run
from nano_moe.studies import exchanging, leak, offloading, specialization
from nano_moe.text.store import Corpus

if TYPE_CHECKING:
    from nano_moe.training.clock import Clock
    from nano_moe.training.step_callback import StepCallback

LOOKS: dict[str, Callable[[Run, Corpus], dict[str, Any]]] = {
    "specialization": specialization.look,
    "leak": leak.look,
    "offload": offloading.look,
    "exchange": exchanging.look,
}
WATCHED = "specialization"  # the look that needs to see the training


def at(name: str, run: Run, corpus: Corpus) -> dict[str, Any]:
    """Its `figures`, one number each, and the `details` behind them."""
    return LOOKS[name](run, corpus)


def watchers(
    name: str | None, run: Run, corpus: Corpus
) -> Sequence[Callable[[Clock], StepCallback]]:
    """Makers of the callbacks that training must have for that look."""
    if name != WATCHED:
        return ()
    from nano_moe.studies.choices import Choices

    return (functools.partial(Choices, run, corpus),)
