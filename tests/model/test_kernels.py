"""CPU kernels against float64 autograd of the plain formulas, at their edges and out of range.

Shapes: M rows, F hidden width, N tokens, K top_k, E experts, V vocabulary, B batch, T time,
H heads, C head width.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from nano_moe.model import attention, fused, kernels, one_pass
from nano_moe.model.ffn import FFN
from nano_moe.model.loss import cross_entropy
from nano_moe.model.ops import RMSNorm
from nano_moe.model.routing import Routing

ROOT = Path(__file__).parents[2]
DTYPES = st.sampled_from(kernels.DTYPES)
ROWS = st.sampled_from((0, 1, 2, 7, 33))
WIDTHS = st.sampled_from((1, 2, 5, 8, 15, 16, 31, 33, 64, 100))
SCALES = st.sampled_from((1e-39, 1e-5, 1.0, 50.0))
STRIDES = st.booleans()  # whether every other number of something wider
SEEDS = st.integers(0, 99)
FP32 = 1e-6  # 16 roundings in float32
ROUNDING = 2.0**-8  # to bfloat16: half a unit in the last place
SMALLEST = {torch.float32: 2.0**-148, torch.bfloat16: 2.0**-133}
EPS = 1e-6


def draw(shape: tuple[int, ...], dtype: torch.dtype, scale: float, strided: bool) -> Tensor:
    """Normal numbers, as a leaf."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1]) * scale
    one = wide.to(dtype)[..., ::2] if strided else wide[..., ::2].to(dtype).contiguous()
    return one.detach().requires_grad_()


def with_gradients(function, *leaves: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """function(leaves) and their gradients for one fixed direction; in `dtype`, if given."""
    leaves = tuple(one.detach().to(dtype or one.dtype).requires_grad_() for one in leaves)
    y = function(*leaves)
    direction = torch.linspace(-1, 1, y.numel()).bfloat16().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, direction, materialize_grads=True)]


def assert_close(value: Tensor, exact: Tensor, roundings: int = 1, size: Tensor | None = None):
    """Near to the float64 one: 1e-6 of its norm, or of `size`; in bf16 each number rounded."""
    assert value.shape == exact.shape
    size = exact.norm() if size is None else size
    error, allowed = (value.double() - exact).abs(), FP32 * size + SMALLEST[value.dtype]
    if value.dtype == torch.bfloat16:
        allowed = allowed + roundings * ROUNDING * exact.abs()
        allowed = allowed + (roundings - 1) * ROUNDING * size
    assert (error <= allowed).all(), f"{(error / allowed).max()} times too far"


def assert_as_faulty(value: Tensor, torchs: Tensor):
    """NaN where PyTorch's operators have NaN, and the same infinities."""
    assert torch.equal(value.isnan(), torchs.isnan())
    assert torch.equal(value.isinf(), torchs.isinf())
    assert torch.equal(value[value.isinf()], torchs[torchs.isinf()].to(value.dtype))


# --- numbers


@numba.njit
def _written(values, out):
    for i in range(len(values)):
        kernels.write(out, i, values[i])


@numba.njit
def _as_read(bits, out):
    for i in range(len(bits)):
        out[i] = kernels.read(bits, i)


@numba.njit(fastmath=kernels._FAST)
def _exponentials(values, out):
    for i in range(len(values)):
        out[i] = kernels.exp(values[i])


def test_every_bfloat16_and_its_neighbours_are_rounded_as_by_pytorch():
    patterns = np.arange(65536, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = torch.from_numpy((patterns[:, None] + low).ravel().view(np.float32))
    written = torch.empty(len(values), dtype=torch.bfloat16)
    _written(values.numpy(), kernels.array(written))
    expected = values.bfloat16()
    assert torch.equal(written.isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(written.view(torch.int16)[known], expected.view(torch.int16)[known])


def test_every_bfloat16_is_read_exactly():
    bits = np.arange(65536, dtype=np.uint16)
    values = np.empty(len(bits), dtype=np.float32)
    _as_read(bits, values)
    assert np.array_equal(values.view(np.uint32), bits.astype(np.uint32) << 16)


def test_exponentials_are_right_to_two_units_in_the_last_place():
    x = np.linspace(-87, 88, 2_000_001).astype(np.float32)
    y, exact = np.empty_like(x), np.exp(x.astype(np.float64))
    _exponentials(x, y)
    assert (np.abs(y - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()


def test_exponentials_end_in_zero_and_infinity_and_keep_nan():
    x = np.array([-np.inf, -1e38, -200, -88, 89, 200, 1e38, np.inf, np.nan, 0], dtype=np.float32)
    y = np.empty_like(x)
    _exponentials(x, y)
    assert np.array_equal(y, [0, 0, 0, 0, *[np.inf] * 4, np.nan, 1], equal_nan=True)
    edge = np.linspace(-89, -87, 10_001).astype(np.float32)
    tail = np.empty_like(edge)
    _exponentials(edge, tail)
    assert (np.abs(tail - np.exp(edge.astype(np.float64))) < 2.0**-126).all()
    assert (np.diff(tail) >= 0).all()


# --- the gated activation


def activation(product: Tensor, weight: Tensor) -> Tensor:
    gate, up = product.tensor_split(2, dim=-1)
    return F.silu(gate) * up * weight.unsqueeze(-1)


class Activation(torch.autograd.Function):
    """The two kernels of the experts' activation, as the experts call them."""

    @staticmethod
    def forward(ctx, product: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(product, weight)
        return fused._activate(product, weight, True)

    @staticmethod
    def backward(ctx, dhidden: Tensor) -> tuple[Tensor, ...]:
        product, weight = ctx.saved_tensors
        again, *gradients = fused._activate_backward(product, weight, dhidden, True)
        once = fused._activate(product, weight, True)
        torch.testing.assert_close(again, once, equal_nan=True)
        return tuple(gradients)


def rows_of(seed: int, rows: int, width: int, dtype: torch.dtype, scale: float) -> tuple:
    torch.manual_seed(seed)
    return draw((rows, 2 * width), dtype, scale, False), torch.rand(rows)


@given(seed=SEEDS, rows=ROWS, width=WIDTHS, dtype=DTYPES, scale=SCALES)
def test_the_activation_equals_float64(seed, rows, width, dtype, scale):
    product, weight = rows_of(seed, rows, width, dtype, scale)
    values = with_gradients(Activation.apply, product, weight)
    exact = with_gradients(activation, product, weight, dtype=torch.float64)
    for value, reference in zip(values[:2], exact[:2], strict=True):
        assert_close(value, reference)
    unweighted = activation(product.detach().double(), torch.ones(rows).double())
    assert_close(values[2], exact[2], size=unweighted.norm())  # an inner product that may cancel


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_far_gates_are_open_or_shut(dtype):
    gates = torch.tensor([-1e38, -1e4, -200, -90, -88, -20, 20, 88, 90, 200, 1e4, 1e38])
    product = torch.stack([gates, torch.full_like(gates, 0.5)], dim=-1).to(dtype)
    values = with_gradients(Activation.apply, product, torch.ones(len(gates)))
    exact = with_gradients(activation, product, torch.ones(len(gates)), dtype=torch.float64)
    for value, reference in zip(values, exact, strict=True):
        error = (value.double() - reference).abs()
        assert (error <= 2 * ROUNDING * reference.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 4, 9, 13])  # two of the gate, two of the other half
def test_a_fault_passes_through_the_activation(dtype, bad, column):
    product, weight = rows_of(0, 3, 9, dtype, 1.0)
    with torch.no_grad():
        product[1, column] = bad
    values = with_gradients(Activation.apply, product, weight)
    torchs = with_gradients(activation, product, weight.to(dtype))
    for value, reference in zip(values, torchs, strict=True):
        assert_as_faulty(value, reference)


@pytest.mark.parametrize("payload", [0x7FFFFFFF, 0x7F800001, -1])
def test_a_routing_weight_that_is_any_nan_gives_nan_in_bf16(payload):
    weight = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    hidden = fused._activate(torch.ones(1, 32, dtype=torch.bfloat16), weight, True)
    assert hidden.isnan().all()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_dense_ffn_equals_float64(dtype):
    torch.manual_seed(0)
    ffn = FFN(12, 20).to(dtype)
    x = draw((2, 5, 12), dtype, 1.0, True)
    operands = (x, ffn.gate_up.weight, ffn.down.weight)

    def plain(x, gate_up, down):
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down.T

    values = with_gradients(
        lambda x, *weights: torch.func.functional_call(
            ffn, dict(zip(("gate_up.weight", "down.weight"), weights, strict=True)), (x,)
        )[0],
        *operands,
    )
    for value, exact in zip(
        values, with_gradients(plain, *operands, dtype=torch.float64), strict=True
    ):
        distance = (value.double() - exact).norm() / exact.norm()
        assert distance < (4 * ROUNDING if dtype == torch.bfloat16 else FP32)


# --- cross-entropy


def plain_loss(targets: Tensor):
    return lambda logits: F.cross_entropy(logits, targets, reduction="none")


def kernel_loss(targets: Tensor):
    return lambda logits: cross_entropy(logits, targets, "none")


@given(
    seed=SEEDS, rows=ROWS, width=WIDTHS, dtype=DTYPES, strided=STRIDES,
    scale=st.sampled_from((1e-39, 1.0, 30.0, 1e4)), shift=st.sampled_from((0.0, 1e4, -1e4)),
)  # fmt: skip
def test_cross_entropy_equals_float64(seed, rows, width, dtype, strided, scale, shift):
    torch.manual_seed(seed)
    logits = (draw((rows, width), dtype, scale, strided) + shift).detach()
    targets = torch.randint(0, width, (2 * rows,))[::2]
    loss, dlogits = with_gradients(kernel_loss(targets), logits)
    exact = with_gradients(plain_loss(targets), logits, dtype=torch.float64)
    assert loss.dtype == torch.float32 and dlogits.dtype == dtype
    assert_close(loss, exact[0], size=exact[0].norm() + 0.1)  # a loss of 0 is log(1 + something)
    assert_close(dlogits, exact[1], size=exact[1].norm() + 0.1)


def test_a_sure_prediction_far_from_zero_keeps_its_small_loss():
    logits = torch.tensor([[1e4, 1e4 - 8, 1e4 - 9]])
    loss = cross_entropy(logits, torch.tensor([0]))
    exact = cross_entropy(logits.double(), torch.tensor([0]))
    assert abs(loss - exact) < 1e-6 * exact + 1e-7


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", range(0, 37, 3))
def test_a_faulty_logit_faults_its_own_row_as_in_pytorch(dtype, bad, column):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 37).to(dtype), torch.tensor([5, 6, 7])
    logits[1, column] = bad
    values = with_gradients(kernel_loss(targets), logits)
    for value, reference in zip(
        values, with_gradients(plain_loss(targets), logits.float()), strict=True
    ):
        assert_as_faulty(value, reference)


def test_logits_masked_by_infinity_get_no_gradient_and_all_masked_give_nan():
    logits = torch.randn(2, 9)
    logits[:, 3:] = -torch.inf
    loss, dlogits = with_gradients(kernel_loss(torch.tensor([0, 2])), logits)
    assert loss.isfinite().all() and not dlogits[:, 3:].any()
    assert cross_entropy(torch.full((1, 9), -torch.inf), torch.tensor([0])).isnan()
    assert cross_entropy(torch.full((1, 9), torch.nan), torch.tensor([0])).isnan()


@pytest.mark.parametrize("wild", [-1, -100, 9, 2**40])
@pytest.mark.parametrize("place", [0, 5])
def test_a_target_out_of_range_raises(wild, place):
    targets = torch.randint(0, 9, (6,))
    targets[place] = wild
    with pytest.raises(IndexError, match=r"not in \[0, 9\)"):
        cross_entropy(torch.randn(6, 9), targets)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(torch.randn(6, 9).double(), targets)  # by PyTorch's operators


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64),
     torch.zeros(6, dtype=torch.int32), torch.zeros(6), torch.zeros(6, dtype=torch.bool)],
    ids=["few", "many", "int32", "float", "bool"],
)  # fmt: skip
def test_targets_that_do_not_fit_raise(targets):
    with pytest.raises((RuntimeError, ValueError)):
        cross_entropy(torch.randn(6, 9), targets)


def test_no_tokens_have_no_losses_and_no_mean():
    logits, targets = torch.empty(0, 9), torch.empty(0, dtype=torch.int64)
    assert cross_entropy(logits, targets, "none").shape == (0,)
    assert cross_entropy(logits, targets).isnan()


# --- RMSNorm


def norm_with(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), EPS)
    norm.weight = torch.nn.Parameter(weight)
    return norm


def kernel_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(RMSNorm(len(weight), EPS), {"weight": weight}, (x,))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@given(
    seed=SEEDS, rows=ROWS, width=WIDTHS, dtype=DTYPES, strided=STRIDES,
    scale=st.sampled_from((0.0, 1e-39, 1e-5, 1.0, 1e15)), three=st.booleans(),
)  # fmt: skip
def test_rms_norm_equals_float64(seed, rows, width, dtype, strided, scale, three):
    torch.manual_seed(seed)
    shape = (2, rows, width) if three else (rows, width)
    x, weight = draw(shape, dtype, scale, strided), draw((width,), dtype, 1.0, False)
    values = with_gradients(kernel_norm, x, weight)
    exact = with_gradients(plain_norm, x, weight, dtype=torch.float64)
    # a long row's gradient is what is left of its direction across the row
    inverse = (x.detach().double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    sizes = [None, (weight.detach().double() * inverse).norm(), exact[0].norm() + 1]
    for value, reference, size in zip(values, exact, sizes, strict=True):
        assert_close(value, reference, size=size)


def test_a_row_of_zeros_and_one_row_alone_are_normalized():
    norm = norm_with(torch.full((20,), 2.0))
    x = torch.zeros(20, requires_grad=True)
    y = norm(x)
    y.backward(torch.ones(20))
    assert not y.any() and torch.allclose(x.grad, torch.full((20,), 2 / EPS**0.5))


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("column", [0, 8, 18])
def test_a_fault_stays_in_its_row_of_rms_norm(dtype, bad, column):
    x, weight = torch.linspace(-1, 1, 57).view(3, 19).to(dtype), torch.ones(19, dtype=dtype)
    x[1, column] = bad  # 3e38 squared is infinite
    y, dx, dweight = with_gradients(kernel_norm, x, weight)
    torchs = with_gradients(plain_norm, x.float(), weight.float())
    assert_as_faulty(y, torchs[0])
    assert dx[[0, 2]].isfinite().all()
    if bad != 3e38:  # of which PyTorch makes infinity times zero in the gradient, and we zero
        assert torch.equal(dx[1].isfinite().all(), torchs[1][1].isfinite().all())
    assert torch.equal(dweight.isfinite(), torchs[2].isfinite())


def test_a_row_of_another_width_raises():
    with pytest.raises(RuntimeError, match="must match"):
        norm_with(torch.ones(8))(torch.randn(2, 16))
    with pytest.raises(RuntimeError, match="must match"):
        norm_with(torch.ones(16))(torch.randn(2, 8))


# --- the heads' norm and rotation


def place_heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, C) to (B, H, T, C)."""
    heads = x.transpose(1, 2)
    if len(weight):
        heads = plain_norm(heads, weight)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def kernel_heads(cos: Tensor, sin: Tensor):
    return lambda x, weight: one_pass.NormAndRotation.apply(x, weight, EPS, cos, sin)


@given(
    seed=SEEDS, dtype=DTYPES, strided=STRIDES, normed=st.booleans(), narrow=st.booleans(),
    batch=st.integers(0, 3), length=st.sampled_from((1, 2, 5, 17)), heads=st.integers(1, 3),
    half=st.sampled_from((1, 3, 4, 8, 16, 17)),
)  # fmt: skip
def test_turned_heads_equal_float64(
    seed, dtype, strided, normed, narrow, batch, length, heads, half
):
    torch.manual_seed(seed)
    narrow = narrow and dtype == torch.bfloat16  # a whole model in bf16, tables and norms too
    x = draw((batch, length, heads, 2 * half), dtype, 1.0, strided)
    weight = torch.rand(2 * half if normed else 0) + 0.5
    tables = (torch.randn(length, 2 * half) for _ in range(2))  # no two halves alike
    rest = [one.bfloat16() if narrow else one for one in (weight, *tables)]
    y, dx, dweight = with_gradients(kernel_heads(*rest[1:]), x, rest[0])
    cos, sin = (table.double() for table in rest[1:])
    exact = with_gradients(
        lambda x, weight: place_heads(x, weight, cos, sin), x, rest[0], dtype=torch.float64
    )
    assert_close(y, exact[0])
    # the turned gradient is rounded on its way to the norm's backward
    assert_close(dx, exact[1], roundings=2 if normed else 1, size=10 * exact[1].norm() + 1e-9)
    noise = FP32 if dtype == torch.float32 else 2 * ROUNDING
    assert ((dweight.double() - exact[2]).abs() <= noise * (exact[0].norm() * 10)).all()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_fault_stays_in_its_head(dtype, normed, bad):
    x = torch.linspace(-1, 1, 2 * 3 * 2 * 12).view(2, 3, 2, 12).to(dtype)
    x[1, 2, 0, 7] = bad
    weight, cos, sin = torch.ones(12 if normed else 0), torch.rand(3, 12), torch.rand(3, 12)
    y, dx, _ = with_gradients(kernel_heads(cos, sin), x, weight)
    torchs = place_heads(x.float(), weight, cos, sin)
    assert_as_faulty(y, torchs)
    assert dx.isfinite().all() == (not normed), "without a norm the gradient knows nothing of x"
    assert dx.flatten(0, 2)[:10].isfinite().all()


@pytest.mark.parametrize("length", [5, 7])
def test_rotary_tables_of_another_length_raise(dense_config, length):
    layer = attention.Attention(dense_config())
    cos, sin = attention.rope_tables(length, layer.head_size, 1e4)
    with pytest.raises(RuntimeError, match="must match"):
        layer(torch.randn(2, 6, 16), cos, sin)


def test_a_whole_model_in_bf16_stays_near_float32(moe_config, build, tokens):
    model = build(moe_config())
    exact = model(tokens)[0]
    narrow = model.bfloat16()(tokens)[0]
    assert narrow.dtype == torch.bfloat16
    assert (narrow - exact).norm() / exact.norm() < 0.1


# --- the plan of chunks and the layout


@given(
    counts=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000)), max_size=70),
    most=st.sampled_from((1, 100, 3000, 10**6)), dtype=DTYPES,
)  # fmt: skip
def test_the_plan_has_room_for_every_expert_with_tokens_and_no_other(counts, most, dtype):
    chunks = fused.plan(counts, most, dtype)
    inside = [expert for chunk in chunks for expert in range(chunk.first, chunk.last)]
    assert inside == [expert for expert, count in enumerate(counts) if count]
    stop = 0
    for chunk in chunks:
        own, n = counts[chunk.first : chunk.last], chunk.last - chunk.first
        assert chunk.start == stop and chunk.rows >= max(own)
        stop = chunk.all_rows.stop
        assert stop == chunk.start + n * chunk.rows
        assert n & (n - 1) == 0
        if n > 1:
            assert n * chunk.rows <= min(most, fused.SPARE * sum(own) + n * fused.SPARE_ROWS)
        elif dtype == torch.bfloat16:
            assert chunk.rows <= own[0] + max(31, own[0] / 8)
        else:
            assert chunk.rows == own[0]


def test_in_bf16_experts_have_few_different_numbers_of_rows():
    rows = {fused.plan([n], 10**9, torch.bfloat16)[0].rows for n in range(1, 2**15 + 1)}
    assert all(n % 32 == 0 for n in rows)
    assert len(rows) == 512 // 32 + 8 * 6, "16 up to 512, and 8 in each doubling to 2^15"


@given(
    seed=SEEDS, n_tokens=st.integers(0, 40), n_experts=st.integers(1, 9), dtype=DTYPES,
    most=st.sampled_from((1, 10**6)), dropped=st.booleans(),
)  # fmt: skip
def test_the_layout_is_by_expert_and_in_order_of_tokens(
    seed, n_tokens, n_experts, dtype, most, dropped
):
    torch.manual_seed(seed)
    top_k = min(2, n_experts)
    ids = torch.rand(n_tokens, n_experts).topk(top_k).indices
    if dropped:
        ids[torch.rand(ids.shape) < 0.4] = n_experts
    counts = torch.bincount(ids.flatten(), minlength=n_experts + 1)[:-1].tolist()
    chunks, weights = fused.plan(counts, most, dtype), torch.rand(ids.shape)
    dest, token, weight = fused._place(ids, weights, chunks, n_experts)
    end = chunks[-1].all_rows.stop if chunks else 0
    carried = ids < n_experts
    assert (dest[~carried] == end).all()
    rows = dest[carried]
    assert len(rows.unique()) == len(rows), "no two share a row"
    for chunk in chunks:
        for expert in range(chunk.first, chunk.last):
            own = dest[ids == expert]
            first = chunk.start + (expert - chunk.first) * chunk.rows
            assert own.tolist() == list(range(first, first + counts[expert]))
    assert torch.equal(token[rows], carried.nonzero()[:, 0])
    assert torch.equal(weight[rows], weights[carried])
    unused = torch.ones(end + 1, dtype=torch.bool).index_fill(0, rows, False)
    assert not weight[unused].any() and not token[unused].any()


def dispatch(ids: list, weights: Tensor, counts: list) -> Tensor:
    """Three tokens, four experts."""
    nothing = torch.empty(3, 4)
    routing = Routing(torch.tensor(ids), weights, nothing, nothing, torch.tensor(counts))
    return fused.fused(torch.randn(3, 8), routing, torch.randn(4, 32, 8), torch.randn(4, 8, 16))


@pytest.mark.parametrize(
    ("ids", "width", "counts", "message"),
    [
        ([[0], [5], [1]], 1, [1, 1, 0, 1], "out of range"),
        ([[0], [-1], [1]], 1, [1, 1, 0, 1], "out of range"),
        ([[0], [2**40], [1]], 1, [1, 1, 0, 1], "out of range"),
        ([[0], [2], [2]], 1, [1, 0, 0, 0], "more assignments"),
        ([[0], [0], [0]], 1, [1, 0, 0, 0], "more assignments"),
        ([[0], [1], [2]], 2, [1, 1, 1, 0], "as many"),
    ],
)
def test_a_routing_that_cannot_be_laid_out_raises(ids, width, counts, message):
    with pytest.raises((IndexError, ValueError), match=message):
        dispatch(ids, torch.ones(3, width), counts)


@pytest.mark.parametrize("wild", [-1, 5, 2**40])
def test_an_expert_that_does_not_exist_raises_where_experts_are_sorted_by_load(wild):
    layout = fused.lay_out([1000, 3, 900, 5], 10**6, torch.bfloat16)
    assert layout.order is not None
    assert layout.places(torch.tensor([1, 3, 4])).tolist() == [0, 1, 4]
    with pytest.raises(IndexError):
        layout.places(torch.tensor([1, wild, 3]))


@pytest.mark.parametrize("wild", [264, 10**9, -1])
@pytest.mark.parametrize("routing", ["token_choice", "hash"])
def test_a_token_out_of_the_vocabulary_raises(moe_config, build, tokens, wild, routing):
    tokens[1, 3] = wild
    with pytest.raises(IndexError):
        build(moe_config(moe={"routing": routing}))(tokens)


# --- where and how kernels run


def everything() -> list[Tensor]:
    """Results and gradients of all kernels, of enough rows that threads share them."""
    torch.manual_seed(0)
    targets, tables = torch.randint(0, 50, (301,)), (torch.randn(43, 12), torch.randn(43, 12))
    runs = []
    for dtype in kernels.DTYPES:
        like = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: B023, E731
        runs += with_gradients(Activation.apply, like(301, 66), torch.rand(301))
        runs += with_gradients(kernel_loss(targets), like(301, 50))
        runs += with_gradients(kernel_norm, like(301, 37), like(37))
        runs += with_gradients(kernel_heads(*tables), like(7, 43, 3, 12), torch.rand(12))
    return runs


def test_many_threads_give_the_same_bits_and_one_almost():
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
    for once, again, two, three in zip(*runs, strict=True):
        assert torch.equal(once, again) and torch.equal(two, three)
        assert_close(once, two.double())


class Tagged(Tensor):
    """A subclass, as DTensor or a quantized weight is one."""


def test_kernels_take_plain_float32_and_bfloat16_in_cpu_memory():
    x = torch.randn(3)
    assert kernels.usable(x, x.bfloat16(), torch.nn.Parameter(x)) and kernels.usable()
    strangers = [x.double(), x.half(), x.long(), x.to("meta"), x.as_subclass(Tagged)]
    with FakeTensorMode():
        strangers.append(torch.empty(3))
    for stranger in strangers:
        assert not kernels.usable(stranger) and not kernels.usable(x, stranger)


def test_kernels_leave_compiled_code_to_the_compiler():
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        seen.append(kernels.usable(x))
        return x + 1

    compiled(torch.randn(3))
    assert seen == [False]


def test_fp16_autocast_and_float64_take_the_operators():
    ffn, x = FFN(8, 16), torch.randn(3, 8)
    exact = ffn(x)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        half = ffn(x)[0]
    assert half.dtype == torch.float16 and torch.allclose(half.float(), exact, atol=1e-2)
    assert torch.allclose(ffn.double()(x.double())[0], exact.double(), atol=1e-5)


def test_nothing_of_the_callers_is_written_to():
    torch.manual_seed(0)
    product, weight = rows_of(0, 4, 9, torch.float32, 1.0)
    logits, targets = torch.randn(4, 9), torch.randint(0, 9, (4,))
    x, scale = torch.randn(4, 9), torch.rand(9)
    heads, tables = torch.randn(2, 3, 2, 6), (torch.rand(3, 6), torch.rand(3, 6))
    mine = [product, weight, logits, targets, x, scale, heads, *tables]
    before = [one.detach().clone() for one in mine]
    with_gradients(Activation.apply, product, weight)
    with_gradients(kernel_loss(targets), logits)
    with_gradients(kernel_norm, x, scale)
    with_gradients(kernel_heads(*tables), heads, torch.rand(6))
    assert all(torch.equal(*pair) for pair in zip(mine, before, strict=True))


def test_gradients_that_are_one_number_seen_everywhere_are_taken():
    """`y.sum().backward()` hands over a gradient without memory of its own."""
    x, weight = torch.randn(4, 9, requires_grad=True), torch.rand(9)
    kernel_norm(x, weight).sum().backward()
    (expected,) = torch.autograd.grad(plain_norm(x, weight).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    heads, tables = torch.randn(2, 3, 2, 6, requires_grad=True), (torch.rand(3, 6),) * 2
    kernel_heads(*tables)(heads, torch.rand(6)).sum().backward()
    assert heads.grad.isfinite().all()
    cross_entropy(x, torch.zeros(4, dtype=torch.int64), "none").sum().backward()


@pytest.fixture(params=["dense", "sparse"])
def model(request, dense_config, moe_config, build):
    return build(dense_config(qk_norm=True) if request.param == "dense" else moe_config())


def gradients_of(model, tokens) -> list[Tensor]:
    loss = cross_entropy(model(tokens)[0], tokens.roll(-1, 1))
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def test_inference_mode_and_copies_give_the_same(model, tokens):
    logits = model(tokens)[0]
    with torch.inference_mode():
        assert torch.equal(model(tokens)[0], logits)
        assert cross_entropy(model(tokens)[0], tokens).isfinite()
    assert torch.equal(copy.deepcopy(model)(tokens)[0], logits)


def test_frozen_weights_change_no_other_gradient(model, tokens):
    whole = dict(
        zip(["", *dict(model.named_parameters())], gradients_of(model, tokens), strict=True)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "down" in name)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, gradient in zip(["", *trained], gradients_of(model, tokens), strict=True):
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6)


def test_a_backward_pass_under_autocast_stays_near(model, tokens):
    exact = gradients_of(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = gradients_of(model, tokens)
    for one, reference in zip(near, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - reference).norm() <= 0.1 * reference.norm() + 1e-4


def test_recomputed_activations_give_the_same_gradients(model, tokens):
    plain = gradients_of(model, tokens)
    model.activation_checkpointing = True
    for one, other in zip(gradients_of(model, tokens), plain, strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 9, requires_grad=True)
    direction = torch.randn(2, 9, requires_grad=True)
    y = kernel_norm(x, torch.rand(9))
    (once,) = torch.autograd.grad(y, x, direction, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_changing_what_the_backward_pass_needs_is_noticed():
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    loss = cross_entropy(logits, targets)
    targets.fill_(10**6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_kept_graph_can_be_gone_through_twice():
    x = torch.randn(3, 9, requires_grad=True)
    loss = checkpoint(lambda x: kernel_norm(x, torch.ones(9)).sum(), x, use_reentrant=False)
    first, second = (torch.autograd.grad(loss, x, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)


def in_a_new_process(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STEP = """
import torch
from nano_moe.model.ops import RMSNorm
norm = RMSNorm(8, 1e-6)
torch.nn.init.ones_(norm.weight)
x = torch.ones(40, 8, requires_grad=True)
def step():
    norm(x).sum().backward()
    return bool(torch.allclose(norm(x), x, atol=1e-5))
"""


def test_a_fork_of_a_process_that_has_run_kernels_runs_them_too():
    """GNU's OpenMP ends such a process if it asks for threads."""
    fork = """
import os
torch.set_num_threads(2)
assert step()
child = os.fork()
if not child:
    os._exit(not step())
print(os.waitpid(child, 0)[1])
"""
    assert in_a_new_process(STEP + fork) == "0"


def test_without_a_folder_to_write_to_kernels_run_uncached():
    nowhere = """
from numba.core import caching
def refuse(self):
    raise PermissionError("read-only")
caching._CacheLocator.ensure_cache_path = refuse
"""
    assert in_a_new_process(nowhere + STEP + "print(step())") == "True"
