"""Processes that form a group for a function, and what becomes of one that fails."""

import pytest
import torch
import torch.distributed as dist

from nano_moe.bench.group import on_ranks
from nano_moe.errors import UserError


def meet(number):
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "total": total.item(), "given": number}


def fail(rank):
    """One stumbles while the others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError("stumbled")
    dist.barrier()


def test_each_rank_hands_back_what_it_found():
    found = on_ranks(2, meet, 7)
    assert found == [{"rank": rank, "total": 1.0, "given": 7} for rank in range(2)]


def test_a_rank_that_fails_ends_all_with_one_line():
    with pytest.raises(UserError) as fault:
        on_ranks(2, fail, 1)
    assert str(fault.value) == "a process of 2: ValueError: stumbled"
