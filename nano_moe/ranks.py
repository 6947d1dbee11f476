"""The processes of one training: which of them this is, and sums over all.

Without a process group there is one process, which leads, and sums are what was given. All
functions but `rank`, `count` and `leads` are collective: every process must call them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if count() > 1 else 0


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def total(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum over all processes, or those of a group; of one process, `x` itself."""
    if count() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over all processes, all in one message; each in its own shape and dtype."""
    if count() == 1 or not values:
        return values
    flat = torch.cat([value.double().flatten() for value in values.values()])
    sums = total(flat).split([value.numel() for value in values.values()])
    return {
        name: (own / count()).view_as(value).to(value.dtype)
        for own, (name, value) in zip(sums, values.items(), strict=True)
    }


def meet() -> None:
    """Wait for all processes."""
    if count() > 1:
        dist.barrier()


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if count() == 1:
        return number
    held = torch.tensor(number, device=_device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def gathered(thing: Any) -> list[Any]:
    """What each process gave, by rank."""
    things = [thing] * count()
    if count() > 1:
        dist.all_gather_object(things, thing)
    return things


def _device() -> torch.device:
    """Where numbers travel from: CPUs of a group that has gloo, else this process's GPU."""
    return torch.device("cpu" if "gloo" in str(dist.get_backend_config()) else "cuda")
