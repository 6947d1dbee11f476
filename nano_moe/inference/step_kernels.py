"""Kernels of decoding: few rows against all weights, so each weight is read once and in order.

With one row a product is as fast as memory gives its weights; with more, a tile of two weight rows
and four rows is kept in registers. Every output belongs to one thread.

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

from nano_moe.model import kernels
from nano_moe.model.kernels import INLINE, Kernel, exp, inverse_rms, largest_of

_f32 = np.float32
_BLOCK = 16  # hidden units that one thread computes at a time, for vectors to be whole
_DATE = zlib.crc32(Path(kernels.__file__).read_bytes())


def _kernel(function: Any) -> Kernel:
    """A `Kernel` that is compiled anew when what it inlines of `model/kernels.py` has changed.

    A kernel on disk is found by its name, and dated by its own file alone.
    """
    function.__name__ = function.__qualname__ = f"{function.__name__}_{_DATE:08x}"
    return Kernel(function)


@njit(**INLINE)
def _tile(x: Any, w: Any, y: Any, b: Any, one: Any, two: Any) -> None:
    """Outputs `one` and `two` of rows b to b + 3."""
    p, q = w[one], w[two]
    r, s, t, u = x[b], x[b + 1], x[b + 2], x[b + 3]
    pr = ps = pt = pu = qr = qs = qt = qu = _f32(0)
    for i in range(w.shape[1]):
        pr += p[i] * r[i]
        ps += p[i] * s[i]
        pt += p[i] * t[i]
        pu += p[i] * u[i]
        qr += q[i] * r[i]
        qs += q[i] * s[i]
        qt += q[i] * t[i]
        qu += q[i] * u[i]
    y[b, one], y[b + 1, one], y[b + 2, one], y[b + 3, one] = pr, ps, pt, pu
    y[b, two], y[b + 1, two], y[b + 2, two], y[b + 3, two] = qr, qs, qt, qu


@njit(**INLINE)
def _pair(x: Any, w: Any, y: Any, b: Any, one: Any, two: Any) -> None:
    """Outputs `one` and `two` of row b."""
    p, q, r = w[one], w[two], x[b]
    pr = qr = _f32(0)
    for i in range(w.shape[1]):
        pr += p[i] * r[i]
        qr += q[i] * r[i]
    y[b, one], y[b, two] = pr, qr


@njit(**INLINE)
def _outputs(x: Any, w: Any, y: Any, first: Any, last: Any, one: Any, two: Any) -> None:
    """Outputs `one` and `two` of rows [first, last): x (., I), w (O, I), y (., O)."""
    tiled = last - (last - first) % 4
    for b in range(first, tiled, 4):
        _tile(x, w, y, b, one, two)
    for b in range(tiled, last):
        _pair(x, w, y, b, one, two)


@_kernel
def linear(x: Any, w: Any, y: Any) -> None:
    """y = x @ w.T: x (B, I), w (O, I), y (B, O)."""
    for pair in prange((len(w) + 1) // 2):
        _outputs(x, w, y, 0, len(x), 2 * pair, min(2 * pair + 1, len(w) - 1))


@_kernel
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
    for s in range(0, end, 2):
        _outputs(q, keys, scores, 0, len(q), s, min(s + 1, end - 1))
    for h in range(len(q)):
        total = _shares(scores[h, :end], _f32(1) / np.sqrt(_f32(q.shape[1])))
        y[h] = _f32(0)
        tiled = end - end % 4
        for s in range(0, tiled, 4):
            _add_four(values, scores[h], s, y[h])
        for s in range(tiled, end):
            for c in range(y.shape[1]):
                y[h, c] += scores[h, s] * values[s, c]
        for c in range(y.shape[1]):
            y[h, c] /= total


@njit(**INLINE)
def _shares(scores: Any, scale: Any) -> Any:
    """e^(scale * score), the largest's 1, in place; their sum."""
    largest, total = largest_of(scores), _f32(0)
    for s in range(len(scores)):
        scores[s] = exp((scores[s] - largest) * scale)
        total += scores[s]
    return total


@njit(**INLINE)
def _add_four(values: Any, shares: Any, s: Any, y: Any) -> None:
    one, two, three, four = values[s], values[s + 1], values[s + 2], values[s + 3]
    p, q, r, t = shares[s], shares[s + 1], shares[s + 2], shares[s + 3]
    for c in range(len(y)):
        y[c] += p * one[c] + q * two[c] + r * three[c] + t * four[c]


@_kernel
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


@_kernel
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


@_kernel
def expand(rows: Any, starts: Any, first: Any, gated: Any, product: Any, hidden: Any) -> None:
    """First products and activation of each expert's rows: SwiGLU, or GELU where not `gated`.

    rows (M, D), starts (E + 1,), first (E, 2F or F, D), product (M, 2F or F), hidden (M, F).
    """
    width = hidden.shape[1]
    for block in prange((width + _BLOCK - 1) // _BLOCK):
        lo, hi = block * _BLOCK, min((block + 1) * _BLOCK, width)
        for e in range(len(first)):
            begin, end = starts[e], starts[e + 1]
            if begin == end:
                continue
            if gated:
                for j in range(lo, hi):
                    _outputs(rows, first[e], product, begin, end, j, j + width)
            else:
                for j in range(lo, hi, 2):
                    _outputs(rows, first[e], product, begin, end, j, min(j + 1, hi - 1))
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


@_kernel
def contract(
    hidden: Any, starts: Any, token: Any, weight: Any, down: Any, product: Any, x: Any
) -> None:
    """x[token[m]] += weight[m] * (down @ hidden[m]), in the order of experts.

    hidden (M, F), starts (E + 1,), token and weight (M,), down (E, D, F), product (M, D), x (B, D).
    """
    width = x.shape[1]
    for pair in prange((width + 1) // 2):
        one, two = 2 * pair, min(2 * pair + 1, width - 1)
        for e in range(len(down)):
            if starts[e] < starts[e + 1]:
                _outputs(hidden, down[e], product, starts[e], starts[e + 1], one, two)
        for m in range(starts[len(down)]):
            for o in range(one, two + 1):
                x[token[m], o] += weight[m] * product[m, o]
