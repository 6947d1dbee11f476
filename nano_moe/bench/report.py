"""What a benchmark hands back: rows of figures, to be printed or written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nano_moe.bench.machine import describe_machine
from nano_moe.bench.timing import Spread

Value = str | int | float | bool | Spread | None
Row = dict[str, Value]


@dataclass(frozen=True)
class Report:
    """Rows with the same keys that follow each other are one table; a key names its unit.

    `figure` is a PNG file of them, where a benchmark draws one.
    """

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    machine: dict[str, Any] = field(default_factory=describe_machine)
    figure: bytes | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; a spread is {"lower", "median", "upper"}."""
        return {
            "title": self.title,
            "machine": self.machine,
            "rows": [{key: _plain(value) for key, value in row.items()} for row in self.rows],
            "notes": list(self.notes),
        }


def _plain(value: Value) -> Any:
    return value._asdict() if isinstance(value, Spread) else value
