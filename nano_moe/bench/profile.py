"""Where the time of a sparse layer goes, by kind of operator."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each profile prints two lines of its own
# Kind -> operators whose own time it is; the last kind takes all others.
KINDS = {
    "expert products": ("aten::bmm", "aten::_grouped_mm"),
    "router product": ("aten::mm", "aten::addmm"),
    "gather and combine": ("aten::index_select", "aten::_embedding_bag_forward_only"),
    "activation": ("InChunks", "InChunksBackward"),  # and the walk over the experts, in Python
    "casts and copies": ("aten::copy_",),
    "other": (),
}


def shares(run: Callable[[int], object], rounds: int, first: int) -> dict[str, float]:
    """Each kind's share of the time that operators take, over some rounds from number `first`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in range(first, first + rounds):
            run(number)
    kind_of = {operator: kind for kind, operators in KINDS.items() for operator in operators}
    microseconds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        microseconds[kind_of.get(event.key, "other")] += event.self_cpu_time_total
    total = sum(microseconds.values())
    return {kind: microseconds[kind] / total for kind in KINDS}
