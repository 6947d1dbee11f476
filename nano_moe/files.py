"""Files that are whole or absent: written beside their place, synced, renamed into it."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nano_moe.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write that becomes `path` at the end of the block, or never existed.

    Raises OSError when the disk refuses; what was at `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """A place beside `path` for a new file or folder, which becomes `path` at the end of the block.

    Or it never existed. Raises FileExistsError where something is at `path` already, and OSError
    when the disk refuses.
    """
    _check_absent(path)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        _check_absent(path)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        _remove(temporary)


def make_folder(path: Path) -> None:
    """The folder and those above it, where they are missing; raises UserError for a file there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{path}: a file is where a folder should be; move it, or work elsewhere"
        ) from error


def _check_absent(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _remove_abandoned(path: Path) -> None:
    """Delete what killed processes left of `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.removesuffix(".tmp").rpartition(".")[2]
        if owner.isdigit() and not _is_running(int(owner)):
            _remove(left)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, all of it or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_torn(folder: Path) -> None:
    """Delete what a killed process left half-written by `replacing` in a folder."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
