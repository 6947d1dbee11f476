"""Several processes on this machine that form one group, for as long as a function takes."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from nano_moe.errors import UserError

PATIENCE = datetime.timedelta(minutes=5)  # of a rank that waits for another
PRELOADED = ["nano_moe.bench.comm"]


def on_ranks(n: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns, as JSON has it, in each of n processes with one thread each.

    They talk by gloo. Raises UserError with the last line of what went wrong in one of them, when
    all have been ended.
    """
    # Forked by a server that has imported torch: doing so in each would take seconds.
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="nano-moe-ranks-") as folder:
        try:
            start_processes(_rank, (n, folder, work, args), nprocs=n, start_method="forkserver")
        except ProcessRaisedException as error:
            raise UserError(f"a process of {n}: {str(error).strip().splitlines()[-1]}") from error
        except ProcessExitedException as error:
            raise UserError(f"a process of {n}: {error}") from error
        return [json.loads(Path(folder, f"{rank}.json").read_text("utf-8")) for rank in range(n)]


def _rank(rank: int, n: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=n, timeout=PATIENCE)
    found = work(*args)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
