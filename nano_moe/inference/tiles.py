"""Inner loops of decoding's kernels, held in vector registers: what LLVM does not find by itself.

A product of few rows with a matrix as it lies is many dot products. A tile of them shares what it
loads, keeps a vector of partial sums for each, and folds four of these into four sums at once. A
row's sums are added in one order, however many rows share the tile.

Shapes: L lanes of a vector, B rows, I and O in and out widths, H heads, S places seen, C head
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Builder = Any
_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
LANES = 16 if _WIDE else 8  # L
ROWS = 4 if _WIDE else 2  # of a tile at most: four sums each then fill half of the registers
OUTPUTS = 4  # of a tile
_LINE = 16  # floats that memory gives at once
_FAST = ("contract", "nsz", "reassoc")
_FLOAT, _INT, _PLACE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


@intrinsic
def tile(
    typing_context: Any, x: Any, w: Any, y: Any, first: Any, rows: Any, output: Any
) -> tuple[Any, Any]:
    """Four outputs from `output` on of 1 to ROWS rows from `first` on: y = x @ w.T there.

    x (B, I), w (O, I), y (B, O).
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        given = zip(signature.args[:3], arguments[:3], strict=True)
        x, w, y = (_Matrix(context, builder, *one) for one in given)
        first, rows, output = arguments[3:]
        for n in range(1, ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", rows, rows.type(n))):
                _write_tile(builder, (x, w, y), first, n, output)
        return context.get_dummy_value()

    return types.void(x, w, y, types.int64, types.int64, types.int64), generate


@intrinsic
def mix(
    typing_context: Any, shares: Any, values: Any, y: Any, head: Any, scale: Any
) -> tuple[Any, Any]:
    """y[head] = scale * shares[head] @ values: shares (H, S or more), values (S, C), y (H, C)."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        given = zip(signature.args[:3], arguments[:3], strict=True)
        shares, values, y = (_Matrix(context, builder, *one) for one in given)
        head, scale = arguments[3:]

        def write(at: Any, mask: Any) -> None:
            total = _mixed(builder, shares.row(head), values, at, mask)
            scaled = builder.fmul(total, _spread(builder, scale, _VECTOR), flags=_FAST)
            _store(builder, scaled, y.row(head), at, mask)

        _stride(builder, values.width, write)
        return context.get_dummy_value()

    return types.void(shares, values, y, types.int64, types.float32), generate


@intrinsic
def fetch(typing_context: Any, w: Any, row: Any) -> tuple[Any, Any]:
    """Ask memory for a row of w (O, I), also for one past its end, which does no harm."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        matrix = _Matrix(context, builder, signature.args[0], arguments[0])
        begin = matrix.row(arguments[1])
        line = _PLACE(_LINE)
        with cgutils.for_range_slice(builder, _PLACE(0), matrix.width, line) as (at, _):
            where = builder.gep(begin, [at], source_etype=_FLOAT)
            settings = [_INT(0), _INT(3), _INT(1)]  # to read, into the nearest cache, data
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), [where, *settings])
        return context.get_dummy_value()

    return types.void(w, types.int64), generate


# --- tiles ---------------------------------------------------------------------------------------


class _Matrix:
    """A two-dimensional array, each of its rows in one piece."""

    def __init__(self, context: Any, builder: Builder, kind: Any, value: Any):
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.data = builder, array.data
        self.length, self.width = cgutils.unpack_tuple(builder, array.shape)
        self.stride = cgutils.unpack_tuple(builder, array.strides)[0]  # in bytes

    def row(self, number: Any) -> Any:
        """Where it begins."""
        offset = self.builder.mul(number, self.stride)
        return cgutils.pointer_add(self.builder, self.data, offset)


def _write_tile(
    builder: Builder, matrices: tuple[_Matrix, _Matrix, _Matrix], first: Any, n: int, output: Any
) -> None:
    x, w, y = matrices
    numbers = [builder.add(first, first.type(i)) for i in range(n)]
    rows = [x.row(number) for number in numbers]
    weights = [w.row(builder.add(output, output.type(i))) for i in range(OUTPUTS)]
    totals = [[_zero(builder) for _ in weights] for _ in rows]

    def add(at: Any, mask: Any) -> None:
        factors = [_load(builder, weight, at, mask) for weight in weights]
        for row, sums in zip(rows, totals, strict=True):
            value = _load(builder, row, at, mask)
            for factor, total in zip(factors, sums, strict=True):
                _multiply_add(builder, total, value, factor)

    _stride(builder, x.width, add)
    for number, sums in zip(numbers, totals, strict=True):
        folded = _folded(builder, [builder.load(total) for total in sums])
        _store(builder, folded, y.row(number), output, None)


def _folded(builder: Builder, parts: list[Any]) -> Any:
    """The sums of four vectors' lanes, as a vector of four."""
    a, b, c, d = parts
    by_one = ((0, LANES, 1, LANES + 1), (2, LANES + 2, 3, LANES + 3))
    by_two = ((0, 1, LANES, LANES + 1), (2, 3, LANES + 2, LANES + 3))
    one, other = _paired(builder, a, b, by_one), _paired(builder, c, d, by_one)
    total, width = _paired(builder, one, other, by_two), LANES
    while width > OUTPUTS:
        width //= 2
        halves = (range(width), range(width, 2 * width))
        low, high = (builder.shuffle_vector(total, total, _constant(half)) for half in halves)
        total = builder.fadd(low, high, flags=_FAST)
    return total


def _paired(builder: Builder, a: Any, b: Any, orders: tuple[tuple[int, ...], ...]) -> Any:
    """Lanes of `a` and `b` in one order plus in another, each said for the first four lanes."""
    chunks = range(0, LANES, 4)
    places = [_constant([chunk + at for chunk in chunks for at in order]) for order in orders]
    one, other = (builder.shuffle_vector(a, b, place) for place in places)
    return builder.fadd(one, other, flags=_FAST)


# --- mixtures ------------------------------------------------------------------------------------

_AT_ONCE = 4  # sums, so that one need not wait for the last


def _mixed(builder: Builder, shares: Any, values: _Matrix, at: Any, mask: Any) -> Any:
    """The values' lanes from `at` on, each place's times its share."""
    totals = [_zero(builder) for _ in range(_AT_ONCE)]

    def add(place: Any, total: Any) -> None:
        share = builder.load(builder.gep(shares, [place], source_etype=_FLOAT), typ=_FLOAT)
        value = _load(builder, values.row(place), at, mask)
        _multiply_add(builder, total, _spread(builder, share, _VECTOR), value)

    length, step = values.length, values.length.type(_AT_ONCE)
    whole = builder.sub(length, builder.srem(length, step))
    with cgutils.for_range_slice(builder, _PLACE(0), whole, step) as (place, _):
        for i, total in enumerate(totals):
            add(builder.add(place, _PLACE(i)), total)
    with cgutils.for_range_slice(builder, whole, length, _PLACE(1)) as (place, _):
        add(place, totals[0])
    a, b, c, d = (builder.load(total) for total in totals)
    one, other = builder.fadd(a, b, flags=_FAST), builder.fadd(c, d, flags=_FAST)
    return builder.fadd(one, other, flags=_FAST)


# --- vectors -------------------------------------------------------------------------------------


def _stride(builder: Builder, length: Any, body: Callable[[Any, Any], None]) -> None:
    """`body` at every L-th place of `length`, and where fewer are left, with the mask of these."""
    left = builder.srem(length, _PLACE(LANES))
    whole = builder.sub(length, left)
    with cgutils.for_range_slice(builder, _PLACE(0), whole, _PLACE(LANES)) as (at, _):
        body(at, None)
    with builder.if_then(builder.icmp_signed(">", left, _PLACE(0)), likely=False):
        lanes = ir.VectorType(_PLACE, LANES)
        numbers = ir.Constant(lanes, list(range(LANES)))
        body(whole, builder.icmp_signed("<", numbers, _spread(builder, left, lanes)))


def _zero(builder: Builder) -> Any:
    """A place for a vector, which LLVM makes a register."""
    place = cgutils.alloca_once(builder, _VECTOR)
    builder.store(ir.Constant(_VECTOR, None), place)
    return place


def _multiply_add(builder: Builder, total: Any, a: Any, b: Any) -> None:
    product = builder.fmul(a, b, flags=_FAST)
    builder.store(builder.fadd(builder.load(total), product, flags=_FAST), total)


def _load(builder: Builder, row: Any, at: Any, mask: Any) -> Any:
    """L floats of a row from `at` on, 0 where a mask is off."""
    where = builder.gep(row, [at], source_etype=_FLOAT)
    if mask is None:
        return builder.load(where, align=4, typ=_VECTOR)
    return _masked(builder, "load", _VECTOR, [where, _INT(4), mask, ir.Constant(_VECTOR, None)])


def _store(builder: Builder, value: Any, row: Any, at: Any, mask: Any) -> None:
    where = builder.gep(row, [at], source_etype=_FLOAT)
    where = builder.bitcast(where, value.type.as_pointer())
    if mask is None:
        builder.store(value, where, align=4)
    else:
        _masked(builder, "store", ir.VoidType(), [value, where, _INT(4), mask])


def _masked(builder: Builder, name: str, returned: Any, arguments: list[Any]) -> Any:
    return _call(builder, f"llvm.masked.{name}.v{LANES}f32.p0", returned, arguments)


def _call(builder: Builder, name: str, returned: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(returned, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _spread(builder: Builder, value: Any, kind: Any) -> Any:
    """A vector with `value` in each lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, value, _INT(0))
    return builder.shuffle_vector(one, nothing, _constant([0] * LANES))


def _constant(places: Any) -> Any:
    """Places of a shuffle."""
    places = list(places)
    return ir.Constant(ir.VectorType(_INT, len(places)), places)
