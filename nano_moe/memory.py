"""This process's memory: what becomes of what PyTorch frees on a CPU, and how much is held.

Freed memory is kept or handed back, for the whole process and with glibc; elsewhere asking does
nothing and says so.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
LARGEST = 2**31 - 1
MMAP_MAX = 2**16  # glibc's own
BLOCK = 4 * 2**20  # larger ones are handed back


def keep_freed_memory() -> bool:
    """Let freed memory be used again instead of handing it back; whether the C library can.

    By default glibc gives large blocks back to the system, and each step's first touch of its
    activations costs a page fault per 4 KiB: a tenth of a training step on a CPU. Blocks are cut up
    and never quite fit again, so the process comes to hold up to twice what is in use.
    """
    return _ask({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST})


def return_freed_memory() -> bool:
    """Hand every large block back when it is freed; whether the C library can.

    The process then holds little more than what is in use, and pays for it in page faults.
    """
    return _ask({M_MMAP_MAX: MMAP_MAX, M_MMAP_THRESHOLD: BLOCK, M_TRIM_THRESHOLD: LARGEST})


def _ask(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in options.items())


def peak_resident() -> int:
    """Bytes of the most physical memory that this process has held.

    Linux's own record: that of getrusage would begin with what the starting process held.
    """
    return memory_of("VmHWM")


def resident() -> int:
    """Bytes of physical memory that this process holds."""
    return memory_of("VmRSS")


def memory_of(field: str) -> int:
    """Bytes of this process under a name of Linux's /proc/self/status; elsewhere its peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = status.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
