"""CPU kernels: one pass over memory where PyTorch's operators would take five.

All are in this file, with what they inline: a kernel on disk is dated by its own file alone.

Compiled by numba at first use and cached on disk. Arrays are float32, or bfloat16 as the uint16 of
its bits; arithmetic is float32. Rows are shared out over the threads and summed in a fixed order:
the same number of threads gives the same bits.

Shapes: M rows, F hidden width, N tokens, K top_k, V vocabulary, B batch, T time, D width, H heads,
C head width, S parts in which sums over rows are kept apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor, nn

# Sums may be reordered and products contracted, but NaN and infinity keep their meaning: "arcp"
# would make 1 / sqrt(infinity) NaN.
_FAST = {"reassoc", "contract", "nsz"}
PARTS = 32  # S; more than any CPU we expect has cores to keep busy
# Inlined by LLVM: numba's own inlining (0.68) drops the last write to an array that was unpacked
# from a tuple of four or more.
INLINE = {"forceinline": True, "fastmath": _FAST}
# What reordering would round off.
_IN_ORDER = {"forceinline": True, "fastmath": {"contract", "nsz"}}
DTYPES = (torch.float32, torch.bfloat16)
FLOAT32 = (torch.float32,)  # alone, where a kernel does not read bfloat16
_f32, _u32, _i32 = np.float32, np.uint32, np.int32
_LEAST = np.int32(-(2**31))
LANES = 32  # numbers that vector instructions take at a time, or a multiple of that


def usable(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether these are real values of `dtypes` in CPU memory, and nobody is tracing."""
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype in dtypes
        for x in tensors
    )


_memory: Callable[[Tensor], np.ndarray[Any, Any]] = Tensor.numpy


def leave_resizable() -> None:
    """From now on memory can be resized after a kernel had it: slower, and sharded weights need it.

    `Tensor.numpy` forbids it for good, and FSDP frees gathered weights by it.
    """
    global _memory
    _memory = np.from_dlpack


def array(x: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's own memory."""
    x = x.detach()
    return _memory(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x)


def _compiled(function: Any, **options: Any) -> Any:
    """`njit`, without a cache on disk where there is no folder to write it to."""
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: no locator available
        return njit(**options)(function)


class Kernel:
    """One function compiled twice: for many threads, and for one.

    A forked child has none of its parent's threads, so there the second runs.
    """

    _pid: int | None = None  # of the process whose threads were started

    def __init__(self, function: Any):
        alone = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_alone")
        alone.__qualname__ = alone.__name__  # numba's cache tells functions apart by it
        self.shared = _compiled(function, parallel=True, fastmath=_FAST)
        # As in the first, no division is checked; no loop with a check in it would be vectorized.
        self.alone = _compiled(alone, fastmath=_FAST, error_model="numpy")

    def __call__(self, *arguments: Any) -> None:
        threads = torch.get_num_threads()
        if threads == 1 or Kernel._pid not in (None, os.getpid()):
            self.alone(*arguments)
            return
        Kernel._pid = os.getpid()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        self.shared(*arguments)
        if torch.get_num_threads() != threads:  # the first start writes numba's own number
            torch.set_num_threads(threads)


def launch(kernel: Any, *arguments: Tensor | float) -> None:
    """Run a kernel on the tensors' memory with as many threads as PyTorch uses."""
    kernel(*(array(a) if isinstance(a, Tensor) else _f32(a) for a in arguments))


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _from_bits(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def read(row, j):
    """row[j] as a float32."""


@overload(read, jit_options=INLINE)
def _overload_read(row, j):
    if row.dtype == types.uint16:
        return lambda row, j: _from_bits(_u32(row[j]) << _u32(16))
    return lambda row, j: row[j]


def write(row, j, value):
    """row[j] = value, rounded to the nearest, ties to even; NaN stays NaN."""


@overload(write, jit_options=INLINE)
def _overload_write(row, j, value):
    if row.dtype == types.uint16:

        def write_rounded(row, j, value):
            bits = _bits(value)
            rounded = (bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16)
            row[j] = np.uint16(rounded if value == value else _u32(0x7FC0))

        return write_rounded

    def write_float(row, j, value):
        row[j] = value

    return write_float


@njit(**_IN_ORDER)
def exp(x: Any) -> Any:
    """e^x to two units in the last place on [-87, 88]; soon beyond them 0 and infinity.

    Cody & Waite's reduction by ln 2 in two parts, then a polynomial on [-ln 2 / 2, ln 2 / 2].
    """
    x = _f32(-88) if x < _f32(-88) else x  # so written, NaN stays NaN
    x = _f32(89) if x > _f32(89) else x
    n = np.floor(x * _f32(1.44269504) + _f32(0.5))
    r = (x - n * _f32(0.693359375)) + n * _f32(2.12194440e-4)
    p = _f32(1.0 / 5040)
    p = p * r + _f32(1.0 / 720)
    p = p * r + _f32(1.0 / 120)
    p = p * r + _f32(1.0 / 24)
    p = p * r + _f32(1.0 / 6)
    p = p * r + _f32(0.5)
    p = p * r * r + r + _f32(1)
    return p * _from_bits(_u32(_i32(n) + _i32(127)) << _u32(23))  # n = -127: 0, n = 128: infinity


@Kernel
def swiglu_forward(product: Any, weight: Any, hidden: Any) -> None:
    """hidden = silu(gate) * up * weight: product (M, 2F), weight (M,), hidden (M, F)."""
    width = hidden.shape[1]
    for m in prange(hidden.shape[0]):
        gate, up, out, scale = product[m, :width], product[m, width:], hidden[m], weight[m]
        for j in range(width):
            g = read(gate, j)
            write(out, j, g / (_f32(1) + exp(-g)) * read(up, j) * scale)


@Kernel
def swiglu_backward(
    product: Any, weight: Any, dhidden: Any, dproduct: Any, hidden: Any, dweight: Any
) -> None:
    """Gradients of `swiglu_forward`, and its output once more.

    product, dproduct (M, 2F); dhidden, of the weighted output, and hidden (M, F); weight,
    dweight (M,).
    """
    width = hidden.shape[1]
    for m in prange(hidden.shape[0]):
        gate, up, given, out = product[m, :width], product[m, width:], dhidden[m], hidden[m]
        dgate, dup, scale, total = dproduct[m, :width], dproduct[m, width:], weight[m], _f32(0)
        for j in range(width):
            g, u, d = read(gate, j), read(up, j), read(given, j)
            sigmoid = _f32(1) / (_f32(1) + exp(-g))
            silu = g * sigmoid
            total += d * silu * u
            d *= scale
            write(out, j, silu * u * scale)
            write(dup, j, d * silu)
            write(dgate, j, d * u * _silu_slope(g, sigmoid))
        dweight[m] = total


@njit(**_IN_ORDER)
def _silu_slope(gate: Any, sigmoid: Any) -> Any:
    return sigmoid * (_f32(1) + gate * (_f32(1) - sigmoid))


@_compiled
def place(ids: Any, weights: Any, starts: Any, dest: Any, token: Any, weight: Any) -> None:
    """Lay assignments out by expert, in order of tokens; an id past the experts goes to the end.

    ids, weights, dest (N, K): where the assignment's row is; starts (E + 1,), used up; of each
    row its token (M + 1,) and weight (M + 1,).
    """
    n_experts, end = len(starts) - 1, len(token) - 1
    if ids.shape != weights.shape:
        raise ValueError("there are not as many routing weights as experts' ids")
    for n in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            expert = ids[n, k]
            if expert < 0 or expert > n_experts:
                raise IndexError("an expert's id is out of range")
            row = starts[expert]
            if row >= end and expert < n_experts:
                raise IndexError("an expert has more assignments than were counted")
            dest[n, k] = row
            if expert < n_experts:
                starts[expert] = row + 1
                token[row] = n
                weight[row] = weights[n, k]


@Kernel
def top_k(scores: Any, places: Any, keys: Any, ids: Any) -> None:
    """Where the K largest of (N, E) are, largest first, of equals the first: ids (N, K).

    places 0, 1, …, keys (S, …) all _LEAST, to work in; both int32 and E long or longer: a multiple
    of LANES, so that the search for a largest one is a few vector instructions.
    """
    parts = len(keys)
    for part in prange(parts):
        row = keys[part]
        for n in range(part * len(scores) // parts, (part + 1) * len(scores) // parts):
            for e in range(scores.shape[1]):
                row[e] = _key(scores[n, e])
            for k in range(ids.shape[1]):
                at = _first_largest(row, places)
                ids[n, k] = at
                row[at] = _LEAST


@njit(**INLINE)
def _key(value: Any) -> Any:
    """An int32 above _LEAST that orders as the float32 does, NaN outside of all others."""
    bits = _i32(_bits(value))
    return max(_i32(bits ^ ((bits >> _i32(31)) & _i32(2**31 - 1))), _i32(_LEAST + 1))


@njit(**INLINE)
def _first_largest(row: Any, places: Any) -> Any:
    largest, first = _LEAST, _i32(len(row))
    for e in range(len(row)):
        largest = row[e] if row[e] > largest else largest
    for e in range(len(row)):
        place = places[e] if row[e] == largest else _i32(len(row))
        first = place if place < first else first
    return first


@Kernel
def take(x: Any, order: Any, y: Any) -> None:
    """y[e] = x[order[e]], (E, m, n), from any dtype to any."""
    rows = x.shape[1]
    for r in prange(len(order) * rows):
        row, out = x[order[r // rows], r % rows], y[r // rows, r % rows]
        for j in range(len(row)):
            write(out, j, read(row, j))


@njit(forceinline=True, fastmath=_FAST | {"nnan"})
def largest_of(row: Any) -> Any:
    """Of a row without NaN; with one it is any of the others, and the sum of exponents is NaN."""
    largest = _f32(-np.inf)
    for j in range(len(row)):
        value = read(row, j)
        largest = value if value > largest else largest
    return largest


@Kernel
def cross_entropy_forward(logits: Any, targets: Any, loss: Any, largest: Any, total: Any) -> None:
    """logits (N, V), targets (N,); loss (N,) in nats, largest logit and sum of e^(logit - largest).

    The logarithm of the sum and the largest stay apart: their sum would round off small losses.
    """
    for n in prange(logits.shape[0]):
        row, shift, summed = logits[n], largest_of(logits[n]), _f32(0)
        for j in range(len(row)):
            summed += exp(read(row, j) - shift)
        largest[n], total[n] = shift, summed
        loss[n] = _loss(summed, read(row, targets[n]), shift)


@njit(**_IN_ORDER)
def _loss(total: Any, logit: Any, shift: Any) -> Any:
    return np.log(total) - (logit - shift)


@Kernel
def cross_entropy_backward(
    logits: Any, targets: Any, largest: Any, total: Any, dloss: Any, dlogits: Any
) -> None:
    """dlogits (N, V) of `cross_entropy_forward`, given dloss (N,)."""
    for n in prange(logits.shape[0]):
        row, out, shift, scale = logits[n], dlogits[n], largest[n], dloss[n] / total[n]
        for j in range(len(row)):
            write(out, j, exp(read(row, j) - shift) * scale)
        target = targets[n]
        write(out, target, exp(read(row, target) - shift) * scale - dloss[n])


@Kernel
def rms_norm_forward(x: Any, weight: Any, eps: Any, y: Any) -> None:
    """y = x / rms(x) * weight: x, y (M, D), weight (D,)."""
    for m in prange(len(x)):
        scale = inverse_rms(x[m], eps)
        for j in range(x.shape[1]):
            write(y[m], j, read(x[m], j) * scale * read(weight, j))


@Kernel
def rms_norm_backward(x: Any, weight: Any, eps: Any, dy: Any, dx: Any, dweight: Any) -> None:
    """Gradients of `rms_norm_forward`: dx (M, D), and dweight (S, D) to be summed."""
    parts = len(dweight)
    for part in prange(parts):
        for m in range(part * len(x) // parts, (part + 1) * len(x) // parts):
            dx[m] = dy[m]
            _norm_back(x[m], weight, eps, dx[m], dweight[part])


@njit(**INLINE)
def inverse_rms(row: Any, eps: Any) -> Any:
    """1 over the root of the row's mean square, to which `eps` is added."""
    total = _f32(0)
    for j in range(len(row)):
        total += read(row, j) * read(row, j)
    return _f32(1) / np.sqrt(total / _f32(len(row)) + eps)


@Kernel
def rotary_forward(x: Any, weight: Any, eps: Any, cos: Any, sin: Any, y: Any) -> None:
    """Normalize each head where there is a weight, then turn it by its position.

    x and y (B*T, H, C), weight (C,) or (0,), cos and sin (T, C).
    """
    half, length = x.shape[2] // 2, len(cos)
    for n in prange(len(x)):
        t = n % length
        for h in range(x.shape[1]):
            row, out = x[n, h], y[n, h]
            scale = inverse_rms(row, eps) if len(weight) else _f32(1)
            for i in range(half):
                j = i + half
                one, two = read(row, i) * scale, read(row, j) * scale
                if len(weight):
                    one, two = one * read(weight, i), two * read(weight, j)
                write(out, i, one * read(cos[t], i) - two * read(sin[t], i))
                write(out, j, two * read(cos[t], j) + one * read(sin[t], j))


@Kernel
def rotary_backward(
    x: Any, weight: Any, eps: Any, cos: Any, sin: Any, dy: Any, dx: Any, dweight: Any
) -> None:
    """Gradients of `rotary_forward`: dx (B*T, H, C), and dweight (S, C) to be summed."""
    half, length, parts = x.shape[2] // 2, len(cos), len(dweight)
    for part in prange(parts):
        for n in range(part * len(x) // parts, (part + 1) * len(x) // parts):
            t = n % length
            for h in range(x.shape[1]):
                _turn_back(dy[n, h], cos[t], sin[t], dx[n, h], half)
                if len(weight):
                    _norm_back(x[n, h], weight, eps, dx[n, h], dweight[part])


@njit(**INLINE)
def _turn_back(given: Any, cos: Any, sin: Any, out: Any, half: Any) -> None:
    for i in range(half):
        j = i + half
        one, two = read(given, i), read(given, j)
        write(out, i, one * read(cos, i) + two * read(sin, j))
        write(out, j, two * read(cos, j) - one * read(sin, i))


@njit(**INLINE)
def _norm_back(row: Any, weight: Any, eps: Any, out: Any, dweight: Any) -> None:
    """`out` holds the gradient of the normalized row, and then that of the row."""
    scale, along = inverse_rms(row, eps), _f32(0)
    for j in range(len(row)):
        normed, given = read(row, j) * scale, read(out, j)
        dweight[j] += given * normed
        along += given * read(weight, j) * normed
    along /= _f32(len(row))
    for j in range(len(row)):
        normed, given = read(row, j) * scale, read(out, j)
        write(out, j, scale * (given * read(weight, j) - normed * along))


# --- the optimizer: S matrices (m, n) of float32, live (S,) --------------------------------------


@Kernel
def nonzero(values: Any, found: Any) -> None:
    for s in prange(len(values)):
        for j in range(values.shape[1]):
            if values[s, j] != 0:
                found[s] = 1
                break


@Kernel
def muon_average(grad: Any, momentum: Any, live: Any, beta: Any, squares: Any) -> None:
    """Of live matrices, momentum; of all, each row's sum of squares of the direction."""
    rows = grad.shape[1]
    for r in prange(len(grad) * rows):
        s, i = r // rows, r % rows
        given, average, total = grad[s, i], momentum[s, i], _f32(0)
        weight = (_f32(1) - beta) * live[s]
        for j in range(len(given)):
            value = average[j] + weight * (given[j] - average[j])
            average[j] = value
            ahead = given[j] + beta * (value - given[j])
            total += ahead * ahead
        squares[s, i] = total


@Kernel
def muon_ahead(grad: Any, momentum: Any, scale: Any, beta: Any, ahead: Any) -> None:
    rows = grad.shape[1]
    for r in prange(len(grad) * rows):
        s, i = r // rows, r % rows
        given, average, out = grad[s, i], momentum[s, i], ahead[s, i]
        for j in range(len(given)):
            write(out, j, (given[j] + beta * (average[j] - given[j])) * scale[s])


@Kernel
def muon_move(weight: Any, step: Any, live: Any, rate: Any, decay: Any) -> None:
    rows = weight.shape[1]
    for r in prange(len(weight) * rows):
        s, i = r // rows, r % rows
        if live[s] != 0:
            row, by = weight[s, i], step[s, i]
            for j in range(len(row)):
                row[j] -= decay * row[j] + rate * read(by, j)


@Kernel
def adamw(
    weight: Any,
    grad: Any,
    average: Any,
    square: Any,
    live: Any,
    average_bias: Any,
    square_bias: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    rate: Any,
    decay: Any,
) -> None:
    rows = weight.shape[1]
    for r in prange(len(weight) * rows):
        s, i = r // rows, r % rows
        if live[s] != 0:
            row, given, first, second = weight[s, i], grad[s, i], average[s, i], square[s, i]
            for j in range(len(row)):
                one = first[j] + (_f32(1) - beta1) * (given[j] - first[j])
                two = second[j] + (_f32(1) - beta2) * (given[j] * given[j] - second[j])
                first[j], second[j] = one, two
                step = one / average_bias[s] / (np.sqrt(two / square_bias[s]) + eps)
                row[j] -= rate * (step + decay * row[j])
