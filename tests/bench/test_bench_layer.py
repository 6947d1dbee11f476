"""What is compared costs the same: FLOPs counted by PyTorch and by the accounting."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nano_moe import accounting
from nano_moe.bench.dense import SeparateFFN
from nano_moe.bench.layer import (
    DENSE,
    FLOORS,
    SHAPES,
    TINY,
    Floor,
    Shape,
    Trial,
    layer,
    table,
    where,
)
from nano_moe.bench.profile import KINDS, shares
from nano_moe.bench.timing import Timings
from nano_moe.model.experts import DISPATCH
from nano_moe.model.ffn import FFN
from nano_moe.model.moe import MoE

UNEVEN = Shape(48, 16, 4, 2, 24, {})


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def dense_flops(shape) -> int:
    """Forward and backward of the dense FFN, as PyTorch counts them."""
    ffn = FFN(shape.width, shape.top_k * shape.hidden)
    x = torch.randn(shape.tokens, shape.width, requires_grad=True)
    return flops(lambda: ffn(x)[0].backward(torch.ones_like(x)))


@pytest.mark.parametrize("shape", [*TINY, UNEVEN], ids=str)
def test_the_floor_is_as_many_flops_as_the_dense_ffn(shape):
    floor = Floor(shape, torch.float32)
    assert flops(lambda: floor.batched(0)) == dense_flops(shape)
    n_rows = shape.tokens * shape.top_k
    floor.counts = [n_rows - 5, 0, 3, 2]  # whatever the router sends
    assert flops(lambda: floor.loop(0)) == dense_flops(shape)


def test_the_floor_multiplies_what_a_layer_would():
    """Both forms fill every output, with the products of forward and backward."""
    floor = Floor(UNEVEN, torch.float32)
    outputs = ("product", "y", "dhidden", "ddown", "dfirst", "dx")
    found = []
    for form in (floor.loop, floor.batched):
        for name in outputs:
            getattr(floor, name).fill_(torch.nan)
        form(0)
        found.append([getattr(floor, name).clone() for name in outputs])
    for name, looped, batched in zip(outputs, *found, strict=True):
        torch.testing.assert_close(looped, batched, msg=name)
    rows = slice(0, floor.counts[0])
    torch.testing.assert_close(found[0][4][0], floor.dproduct[rows].T @ floor.rows[rows])


@pytest.mark.parametrize("shape", [*SHAPES, *TINY], ids=str)
def test_dense_and_sparse_layers_have_equal_active_flops(shape):
    """By accounting: the router, which only one side has, is a group apart."""
    sparse = shape.config()
    dense = sparse.model_copy(update={"moe": None})

    def products(config, kind):
        groups = accounting.weight_groups(config)
        return sum(2 * g.size * g.products for g in groups if g.kind == kind)

    assert products(sparse, "experts") == products(dense, "ffn") > 0
    built = MoE(sparse)
    assert sum(p.numel() for p in built.parameters()) == sum(
        g.size * g.copies
        for g in accounting.weight_groups(sparse)
        if g.kind in ("experts", "router")
    )
    ffn_flops = 3 * products(dense, "ffn") * shape.tokens
    assert ffn_flops == 18 * shape.tokens * shape.width * shape.top_k * shape.hidden


def test_separate_products_are_the_same_function():
    ffn = FFN(16, 24)
    x = torch.randn(5, 16)
    torch.testing.assert_close(
        SeparateFFN(ffn)(x, None, None)[0], ffn(x, None, None)[0]
    )  # as a block calls


def test_rounds_differ_in_how_many_tokens_each_expert_gets():
    trial = Trial(UNEVEN, "fp32")
    counts = set()
    for number in range(5):
        trial.refresh(number)
        assert sum(trial.floor.counts) == UNEVEN.tokens * UNEVEN.top_k
        counts.add(tuple(trial.floor.counts))
    assert len(counts) > 3


def test_a_table_compares_with_the_faster_dense_form_and_the_faster_floor():
    trial = Trial(TINY[0], "fp32")
    slow, fast = DENSE
    seconds = {slow: [4, 4], fast: [2, 2], "auto": [3, 1], FLOORS[0]: [1, 1], FLOORS[1]: [9, 9]}
    rows = {row["case"]: row for row in table(trial, Timings(seconds))}
    assert rows[slow]["ratio"].median == 2 and rows[fast]["ratio"].median == 1
    assert rows["auto"]["ratio"] == (0.75, 1, 1.25)
    assert rows["auto"]["of floor"] == pytest.approx((1 / 3 + 1) / 2)
    assert rows["auto"]["target"] == 1.0 and rows["auto"]["met"] is True
    assert rows[slow]["target"] is None and rows[slow]["met"] is None


def test_a_backend_that_cannot_run_is_named_and_left_out(monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setitem(DISPATCH, "loop", refuse)
    report = layer(quick=True)
    assert "loop" not in {row.get("case") for row in report.rows}
    assert any("loop cannot run (no kernel)" in note for note in report.notes)


def test_a_profile_adds_up_and_sees_what_a_layer_does():
    row = where(Trial(UNEVEN, "fp32"))
    shares = {kind: row[kind] for kind in KINDS}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in shares.values())


def test_a_profile_is_of_what_runs():
    square = torch.randn(200, 200)
    found = shares(lambda number: square @ square, 3, first=0)
    assert found["router product"] > 0.5 > found["expert products"]
