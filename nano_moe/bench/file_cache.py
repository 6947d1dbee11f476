"""The system's cache of a file: emptied, so that reading is from disk, and how much of it stayed.

Asked, the system drops what it can: nothing of a file system in memory (tmpfs), and no page that a
process has mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from nano_moe.errors import UserError

MOST_LEFT = 0.05  # of a file's pages; with more, what was read next was not from disk alone
TRIES, PAUSE = 3, 0.01  # seconds; a page that is just being read cannot be dropped
PROBE = 2**20  # bytes


def empty(path: Path) -> float:
    """Drop a file from the system's cache; the share of it that stayed.

    1 where the system cannot be asked to, or does not tell.
    """
    if not hasattr(os, "posix_fadvise"):
        return 1.0
    for attempt in range(TRIES):
        time.sleep(PAUSE if attempt else 0)
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left = _cached_share(file.fileno())
        if left <= MOST_LEFT:
            break
    return left


def _cached_share(handle: int) -> float:
    """By mincore, which reads nothing in; 1 where there is none or it fails."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-content.size // mmap.PAGESIZE), np.uint8)
        start, size = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(content.size)
        del content  # or the map could not be closed
        if mincore is None or mincore(start, size, ctypes.c_void_p(pages.ctypes.data)):
            return 1.0
    return float((pages & 1).mean())  # the other bits have no meaning yet


def check_can_be_emptied(folder: Path) -> None:
    """Raises UserError where reading files of this folder cannot be timed from disk."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cache-") as file:
        file.write(bytes(PROBE))
        file.flush()
        os.fsync(file.fileno())
        check_left(empty(Path(file.name)), folder)


def check_left(left: float, where: Path) -> None:
    """Raises UserError where too much of a file stayed for the next reading to be from disk."""
    if left > MOST_LEFT:
        raise UserError(
            f"{where}: {left:.0%} of a file there stayed in the system's cache after it was "
            "emptied, so reading from disk cannot be timed; work on a disk, not in memory (tmpfs; "
            "TMPDIR names the folder for temporary files), with no other process at the file"
        )
