"""The machine that timings were taken on."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch

from nano_moe.device import native_bf16
from nano_moe.errors import UserError
from nano_moe.memory import keep_freed_memory


def get_ready(threads: int | None) -> None:
    """Set the process up as a training is; raises UserError for more threads than cores."""
    allocator()
    if threads is None:
        return
    if not 1 <= threads <= n_cores():
        raise UserError(f"--threads {threads}: there are 1 to {n_cores()} to choose from here")
    torch.set_num_threads(threads)


@functools.cache
def allocator() -> str:
    """What becomes of freed memory, after asking the C library to keep it, as training does."""
    return "keeps freed memory" if keep_freed_memory() else "the C library's default"


def n_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge a timing, as plain values."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": n_cores(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(memory / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": allocator(),
        "bf16_native": native_bf16(torch.device("cpu")),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
