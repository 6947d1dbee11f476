"""Where a corpus is built, beside its place: whole under its final name, or not there.

What comes from the hub is gone on with where a fault or a kill left it.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_moe.errors import UserError
from nano_moe.files import remove_torn, sync, write_text

BEGUN, LOCK = ".begun", ".lock"


@dataclass(frozen=True)
class Place:
    """Where a corpus is built: its tokens, the texts until then, and notes of how far it is."""

    folder: Path
    keeps: bool  # notes, to go on from after a fault

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def texts(self) -> Path:
        return self.folder / "texts"

    def noted(self, what: str) -> dict[str, Any] | None:
        path = self.folder / f"{what}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def note(self, what: str, found: dict[str, Any]) -> None:
        if self.keeps:
            write_text(self.folder / f"{what}.json", json.dumps(found))

    def finish(self, folder: Path) -> None:
        """The tokens become `folder`, unless another process was first."""
        for path in [*self.tokens.iterdir(), self.tokens]:
            sync(path)
        try:
            self.tokens.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)


@contextmanager
def beside(folder: Path) -> Iterator[Place]:
    """A temporary place that becomes `folder` at the end, or never existed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    place = Place(aside(folder), keeps=False)
    place.tokens.mkdir(parents=True)
    try:
        yield place
        place.finish(folder)
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


@contextmanager
def kept(folder: Path) -> Iterator[Place]:
    """A place that stays after a fault or a kill, to go on from, and becomes `folder` at the end.

    It begins anew, with a warning, where what is noted is not there.
    """
    place = Place(folder.with_name(f".{folder.name}{BEGUN}"), keeps=True)
    place.tokens.mkdir(parents=True, exist_ok=True)
    for written in (place.folder, place.tokens):
        remove_torn(written)
    try:
        yield place
    except UserError:
        if not any(place.folder.glob("*.json")):  # nothing to go on from
            shutil.rmtree(place.folder, ignore_errors=True)
        raise
    except (ValueError, LookupError, TypeError, FileNotFoundError) as error:
        shutil.rmtree(place.folder, ignore_errors=True)
        raise UserError(
            f"{place.folder}: what was prepared so far is damaged ({error}) and was deleted; "
            "run the same again"
        ) from error
    place.finish(folder)
    shutil.rmtree(place.folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what a killed process left of this folder, once it is a day old."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if left.suffix in (BEGUN, LOCK):
            continue
        with suppress(OSError):  # another process may be done with it by now
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


def aside(folder: Path) -> Path:
    """A name beside the folder that no other process uses."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
