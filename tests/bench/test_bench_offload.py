"""What `bench offload` reports of one budget."""

from pathlib import Path

import pytest
import torch

from nano_moe.bench.offload import Case, _untrained, measure


def test_everything_in_memory_misses_nothing_once_it_was_read(tmp_path):
    run = _untrained(Path(tmp_path), quick=True)
    threads = torch.get_num_threads()
    found = measure(Case(str(run.path), tokens=12, budget="100%"))
    assert torch.get_num_threads() == threads
    everything = 4 * 8 * 3 * 16 * 32 * 4  # layers, experts, matrices, D, F, bytes
    assert found["experts, GB"] == pytest.approx(everything / 1e9)
    some = measure(Case(str(run.path), tokens=12, budget="12.5%", cold=True))
    assert 0 <= some["hits"] < found["hits"] <= 1 and some["tokens/s"] > 0
