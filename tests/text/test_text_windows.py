"""Windows: training samples are a pure function of their index; evaluation covers every token."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.text.store import Split
from nano_moe.text.windows import EvalWindows, TrainWindows


def split_of(lengths: list[int]) -> Split:
    """Documents of these lengths; token i is i, document d is of domain d % 3."""
    table = np.array(lengths, np.int64)
    return Split(
        tokens=np.arange(table.sum(), dtype=np.uint16),
        starts=np.cumsum(table) - table,
        domain_ids=np.arange(len(table)) % 3,
        n_bytes=table - 1,
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(2, 40))
def test_every_token_is_predicted_exactly_once(lengths, context):
    split = split_of(lengths)
    windows = EvalWindows(split, context, end_id=999)
    targets = np.concatenate([target for _, target, _ in windows])
    assert targets.tolist() == split.tokens.tolist()
    inputs = np.concatenate([one for one, _, _ in windows])
    assert inputs.tolist() == [999, *split.tokens[:-1].tolist()]
    domains = np.concatenate([one for _, _, one in windows])
    assert domains.tolist() == np.repeat(split.domain_ids, lengths).tolist()
    assert all(len(target) == context for _, target, _ in list(windows)[:-1])
    assert len(list(windows)) == len(windows)
    assert all(part.dtype == np.int64 for part in windows[0])


def test_there_is_no_window_beyond_the_last():
    windows = EvalWindows(split_of([10]), 4, 0)
    assert len(windows) == 3 and len(windows[2][1]) == 2
    for i in (3, -1):
        with pytest.raises(IndexError):
            windows[i]


@given(st.integers(3, 700), st.integers(2, 40), st.integers(0, 2**31), st.integers(0, 3))
def test_an_epoch_visits_each_window_once(n, context, seed, epoch):
    if n <= context:
        return
    windows = TrainWindows(np.arange(n, dtype=np.uint16), context, seed)
    first = epoch * windows.n_per_epoch
    samples = [windows[first + i] for i in range(windows.n_per_epoch)]
    starts = sorted(int(sample[0]) for sample in samples)
    assert all(np.array_equal(s, np.arange(s[0], s[0] + context + 1)) for s in samples)
    assert starts == list(range(starts[0], starts[0] + len(starts) * context, context))
    assert 0 <= starts[0] < context
    assert n - (starts[-1] + context + 1) < 2 * context  # little is left out


def test_a_sample_depends_on_nothing_but_its_index():
    tokens = np.arange(5000, dtype=np.uint32)
    windows = TrainWindows(tokens, 16, seed=7)
    n = windows.n_per_epoch
    order = np.random.default_rng(0).permutation(3 * n)
    visited = {int(i): windows[int(i)] for i in order}
    for i in range(0, 3 * n, 17):
        assert np.array_equal(visited[i], TrainWindows(tokens, 16, 7)[i])


def test_epochs_and_seeds_differ():
    tokens = np.arange(5000)
    first = TrainWindows(tokens, 16, seed=7)
    n = first.n_per_epoch
    one = [int(first[i][0]) for i in range(n)]
    two = [int(first[n + i][0]) for i in range(n)]
    other = [int(TrainWindows(tokens, 16, seed=8)[i][0]) for i in range(20)]
    assert one != two and one[:20] != other
    assert one != sorted(one)


def test_samples_are_pinned():
    """Order and offsets may never change: a resumed run would see other data."""
    code = (
        "import numpy as np; from nano_moe.text.windows import TrainWindows as W;"
        "w = W(np.arange(1000), 32, 1337); print([int(w[i][0]) for i in (0, 1, 2, 29, 30, 60)])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    windows = TrainWindows(np.arange(1000), 32, 1337)
    here = [int(windows[i][0]) for i in (0, 1, 2, 29, 30, 60)]
    assert other.stdout.strip() == str(here)
    assert here == [289, 513, 577, 865, 43, 106]


def test_too_few_tokens():
    with pytest.raises(ValueError, match="fewer than one window"):
        TrainWindows(np.arange(8), 8, 0)
    assert TrainWindows(np.arange(9), 8, 0)[5].tolist() == list(range(9))
    with pytest.raises(IndexError):
        TrainWindows(np.arange(9), 8, 0)[-1]
