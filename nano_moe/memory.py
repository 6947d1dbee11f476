"""What the C library does with memory that PyTorch frees on a CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let freed memory be used again instead of handing it back; whether the C library can.

    By default glibc gives every large block back to the system, and each step's first touch of its
    activations costs a page fault per 4 KiB: a tenth of a training step on a CPU. For the process;
    it then holds its largest working set until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
