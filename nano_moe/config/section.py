"""What the parts of a recipe share: strict and frozen, faults that name their field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class FieldFault(ValueError):
    """A fault between fields; `field` is relative to the section that raises it."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _writable(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("holds a character that no file name or text can; remove it")
        return value


def nearest(width: int, multiple: int) -> str:
    """The multiples on either side, in words for a fault."""
    below = width // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)
