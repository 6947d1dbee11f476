"""Files that are whole or absent: written beside their place, synced, renamed into it.

A sealed file ends with the sha256 of what stands before it, so that one spoilt later is told apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nano_moe.errors import UserError

SEAL = b"\nnano_moe sha256 "
SEAL_BYTES = len(SEAL) + 64 + 1  # hexadecimal digits and a line's end


@contextlib.contextmanager
def replacing(path: Path, *, sealed: bool = False, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write that becomes `path` at the end of the block, or never existed.

    What was at `path` becomes `keep`, where that is given. Raises OSError when the disk refuses;
    what was there is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            if sealed:
                file.seek(0)
                file.write(SEAL + hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_damaged(path: Path) -> bool:
    """Whether a sealed file is another than was written; one without a seal is never called so."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END) - SEAL_BYTES
        file.seek(max(0, length))
        seal = file.read()
        if not seal.startswith(SEAL):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        while length > 0:
            part = file.read(min(length, 1 << 20))
            digest.update(part)
            length -= len(part) or length
    return seal != SEAL + digest.hexdigest().encode() + b"\n"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """One process at a time between here and the block's end, by a lock file that goes with it.

    A killed process holds no lock. Raises BlockingIOError where another holds it and `wait` is
    off, and OSError where the file cannot be made. Without effect on disks that know no locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle, wait)
            if _is_at(handle, path):  # else its holder has removed it meanwhile
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """A place beside `path` for a new file or folder, which becomes `path` at the end of the block.

    Or it never existed. Raises UserError where something is at `path` already, and when the disk
    refuses.
    """
    try:
        with _creating(path) as place:
            yield place
    except FileExistsError as error:
        raise UserError(
            f"{path}: exists and is not overwritten; name another target, or move it away"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}); nothing is left of it, "
            "check the path and the disk"
        ) from error


@contextlib.contextmanager
def _creating(path: Path) -> Iterator[Path]:
    _check_absent(path)
    remove_abandoned(path)
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


def remove_abandoned(path: Path) -> None:
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
