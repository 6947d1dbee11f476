"""Kernels of decoding: few rows against all weights, so each weight is read once and in order.

What memory gives is most of what a step costs: weights are asked for while those before them are
still at work (`tiles.py`). What two threads both write, at the edge of their parts, has equal bits.

Shapes: B rows, D d_model, I and O in and out widths, E experts, K top_k, F hidden width, H query
heads, G key/value heads, C head width, T context, R places held per row, S of them seen, M
assignments, by expert.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from nano_moe.inference import tiles
from nano_moe.inference.tiles import OUTPUTS, ROWS, fetch, mix, tile
from nano_moe.model import kernels
from nano_moe.model.kernels import INLINE, Kernel, exp, inverse_rms, largest_of

_f32 = np.float32
_SHORT = 256  # rows of weights that end before hardware has begun to look ahead
_BLOCK = 16  # hidden units that one thread computes at a time, for vectors to be whole
_SOURCES = (kernels.__file__, tiles.__file__)
_DATE = zlib.crc32(b"".join(Path(source).read_bytes() for source in _SOURCES))


def kernel(function: Any) -> Kernel:
    """A `Kernel` that is compiled anew when what it inlines of other files has changed.

    A kernel on disk is found by its name, and dated by its own file alone.
    """
    function.__name__ = function.__qualname__ = f"{function.__name__}_{_DATE:08x}"
    return Kernel(function)


@njit(**INLINE)
def _products(x: Any, w: Any, y: Any, first: Any, last: Any, lo: Any, hi: Any) -> None:
    """Outputs [lo, hi), up to three more, of rows [first, last): x (., I), w (O, I), y (., O)."""
    if len(w) < OUTPUTS:
        for b in range(first, last):
            for o in range(lo, hi):
                y[b, o] = _dot(x[b], w[o])
        return
    for o in range(lo, hi, OUTPUTS):
        if w.shape[1] <= _SHORT:
            for row in range(o + OUTPUTS, o + 2 * OUTPUTS):
                fetch(w, row)
        for b in range(first, last, ROWS):
            tile(x, w, y, b, min(ROWS, last - b), min(o, len(w) - OUTPUTS))


@njit(**INLINE)
def _dot(one: Any, other: Any) -> Any:
    total = _f32(0)
    for i in range(len(one)):
        total += one[i] * other[i]
    return total


@kernel
def linear(x: Any, w: Any, y: Any) -> None:
    """y = x @ w.T: x (B, I), w (O, I), y (B, O)."""
    for block in prange((len(w) + _BLOCK - 1) // _BLOCK):
        _block(x, w, y, block)


@njit(**INLINE)
def _block(x: Any, w: Any, y: Any, block: Any) -> None:
    _products(x, w, y, 0, len(x), block * _BLOCK, min((block + 1) * _BLOCK, len(w)))


@kernel
def project(x: Any, w_q: Any, w_k: Any, w_v: Any, q: Any, k: Any, v: Any) -> None:
    """`linear` three times: w_k and w_v are equally high."""
    n_q, n_k = (len(w_q) + _BLOCK - 1) // _BLOCK, (len(w_k) + _BLOCK - 1) // _BLOCK
    for block in prange(n_q + 2 * n_k):
        if block < n_q:
            _block(x, w_q, q, block)
        elif block < n_q + n_k:
            _block(x, w_k, k, block - n_q)
        else:
            _block(x, w_v, v, block - n_q - n_k)


@kernel
def attention(
    q: Any,
    k: Any,
    v: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    cos: Any,
    sin: Any,
    places: Any,
    keys: Any,
    values: Any,
    scores: Any,
    y: Any,
) -> None:
    """Writes the new key and value at each row's place; y (B, H, C) of all places up to it.

    q (B, H, C) and k (B, G, C) are normalized and turned here, v (B, G, C); norms (C,) or (0,); cos
    and sin (T, C), places (B,), keys and values (B, G, R, C), scores (B, H, R).
    """
    n_groups = k.shape[1]
    each = q.shape[1] // n_groups
    for n in prange(len(q) * n_groups):
        b, g, end = n // n_groups, n % n_groups, places[n // n_groups] + 1
        heads = slice(g * each, (g + 1) * each)
        for head in q[b, heads]:
            _turn(head, q_norm, eps, cos[end - 1], sin[end - 1])
        _turn(k[b, g], k_norm, eps, cos[end - 1], sin[end - 1])
        for c in range(k.shape[2]):
            keys[b, g, end - 1, c] = k[b, g, c]
            values[b, g, end - 1, c] = v[b, g, c]
        _attend(q[b, heads], keys[b, g, :end], values[b, g, :end], scores[b, heads], y[b, heads])


@njit(**INLINE)
def _turn(head: Any, norm: Any, eps: Any, cos: Any, sin: Any) -> None:
    """Normalizes where there is a weight, and turns pairs (i, i + C/2), in place."""
    half = len(head) // 2
    if len(norm):
        scale = inverse_rms(head, eps)
        for c in range(len(head)):
            head[c] *= scale * norm[c]
    for i in range(half):
        one, two = head[i], head[i + half]
        head[i] = one * cos[i] - two * sin[i]
        head[i + half] = two * cos[i + half] + one * sin[i + half]


@njit(**INLINE)
def _attend(q: Any, keys: Any, values: Any, scores: Any, y: Any) -> None:
    """Heads that share keys and values: q and y (., C), keys and values (S, C), scores (., R)."""
    end = len(keys)
    _products(q, keys, scores, 0, len(q), 0, end)
    for h in range(len(q)):
        total = _shares(scores[h, :end], _f32(1) / np.sqrt(_f32(q.shape[1])))
        mix(scores, values, y, h, _f32(1) / total)


@njit(**INLINE)
def _shares(scores: Any, scale: Any) -> Any:
    """e^(scale * score), the largest's 1, in place; their sum."""
    largest, total = largest_of(scores), _f32(0)
    for s in range(len(scores)):
        scores[s] = exp((scores[s] - largest) * scale)
        total += scores[s]
    return total


@kernel
def score(logits: Any, softmax: Any) -> None:
    """Router logits (B, E) to their softmax or sigmoid, in their place."""
    for b in range(len(logits)):
        row = logits[b]
        if softmax:
            total = _shares(row, _f32(1))
            for e in range(len(row)):
                row[e] /= total
        else:
            for e in range(len(row)):
                row[e] = _f32(1) / (_f32(1) + exp(-row[e]))


@kernel
def assign(
    x: Any,
    scores: Any,
    ids: Any,
    scale: Any,
    normalize: Any,
    rows: Any,
    token: Any,
    weight: Any,
    starts: Any,
) -> None:
    """Lays tokens out by expert, x (B, D) to rows (M, D), each with the weight of its score.

    scores (B, E), ids (B, K), scale (E,); token and weight (M,); expert e has the rows from
    starts[e] to starts[e + 1], (E + 1,).
    """
    m, tiny = 0, np.finfo(np.float32).tiny
    for e in range(len(scale)):
        starts[e] = m
        for b in range(len(ids)):
            total = _f32(0)
            for k in range(ids.shape[1]):
                total += scores[b, ids[b, k]]
            for k in range(ids.shape[1]):
                if ids[b, k] == e:
                    share = scores[b, e] / max(total, tiny) if normalize else scores[b, e]
                    rows[m], token[m], weight[m] = x[b], b, share * scale[e]
                    m += 1
    starts[len(scale)] = m


@kernel
def expand(rows: Any, starts: Any, first: Any, gated: Any, product: Any, hidden: Any) -> None:
    """First products and activation of each expert's rows: SwiGLU, or GELU where not `gated`.

    rows (M, D), starts (E + 1,), first (E, 2F or F, D), product (M, 2F or F), hidden (M, F).
    """
    width = hidden.shape[1]
    for block in prange((width + _BLOCK - 1) // _BLOCK):
        lo, hi = block * _BLOCK, min((block + 1) * _BLOCK, width)
        for e in range(len(first)):
            begin, end = starts[e], starts[e + 1]
            if begin < end:
                _products(rows, first[e], product, begin, end, lo, hi)
                if gated:
                    _products(rows, first[e], product, begin, end, lo + width, hi + width)
                for m in range(begin, end):
                    _activate(product[m], hidden[m], lo, hi, gated)


@njit(**INLINE)
def _activate(product: Any, hidden: Any, lo: Any, hi: Any, gated: Any) -> None:
    if gated:
        gate, up = product[lo:hi], product[lo + len(hidden) : hi + len(hidden)]
        for j in range(hi - lo):
            hidden[lo + j] = gate[j] / (_f32(1) + exp(-gate[j])) * up[j]
    else:
        for j in range(lo, hi):
            half = _f32(0.5) * product[j]
            hidden[j] = half * (_f32(1) + math.erf(product[j] * _f32(0.5**0.5)))


@kernel
def contract(
    hidden: Any, starts: Any, token: Any, weight: Any, down: Any, product: Any, x: Any
) -> None:
    """x[token[m]] += weight[m] * (down @ hidden[m]), in the order of experts.

    hidden (M, F), starts (E + 1,), token and weight (M,), down (E, D, F), product (M, D), x (B, D).
    """
    width = x.shape[1]
    for block in prange((width + _BLOCK - 1) // _BLOCK):
        lo, hi = block * _BLOCK, min((block + 1) * _BLOCK, width)
        for e in range(len(down)):
            if starts[e] < starts[e + 1]:
                _products(hidden, down[e], product, starts[e], starts[e + 1], lo, hi)
        for m in range(starts[len(down)]):
            share, out, said = weight[m], x[token[m]], product[m]
            for o in range(lo, hi):
                out[o] += share * said[o]
