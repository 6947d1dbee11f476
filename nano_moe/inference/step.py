"""One step of decoding on a CPU: a token per row through all layers, by kernels alone.

A step of a small model is a few hundred microseconds of arithmetic; PyTorch's operators, each with
its own launch, take ten times that. What is computed is what `GPT.forward` says, and without this
module decoding goes that way. Here the weights are read where they lie, and the cache is the
one that the decoder itself uses, so that either may go on where the other stopped.

Shapes: B rows, D d_model, V vocabulary, E experts, K top_k, F hidden width, H query heads, G
key/value heads, C head width, R places held per row, M assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nano_moe.inference import step_kernels
from nano_moe.inference.offload import OffloadedExperts
from nano_moe.model import kernels
from nano_moe.model.attention import Attention
from nano_moe.model.cache import Cache, LayerCache
from nano_moe.model.experts import Experts
from nano_moe.model.ffn import FFN
from nano_moe.model.gpt import GPT, Block
from nano_moe.model.kernels import Kernel, array
from nano_moe.model.moe import MoE
from nano_moe.model.ops import RMSNorm
from nano_moe.model.router import Router

Array = np.ndarray[Any, Any]
SHARED = 2**19  # multiply-adds from which on a kernel is worth waking the other threads
SLOWER = 8  # an attention's multiply-add takes as long: no key is met twice, and it has exponents
# Rows up to which kernels beat PyTorch's products: any model's, and those times the width of one
# that is so small that launching a product costs more than computing it.
ROWS, ROWS_BY_WIDTH = 16, 2**14
# What a step knows how to compute; a class of another name computes something else.
PARTS = {GPT, Block, Attention, FFN, MoE, Router, Experts, RMSNorm, nn.Embedding, nn.Linear}
PARTS |= {nn.ModuleList, nn.Identity, OffloadedExperts}


def fits(model: nn.Module, n_rows: int = 1) -> bool:
    """Whether a `Step` computes what the model does, fast, and nobody listens to its parts.

    Not latent attention, hashes, expert choice, groups and windows of routers, nor other dtypes and
    devices, nor many rows: those are PyTorch's.
    """
    if type(model) is not GPT or model.training or torch.is_autocast_enabled("cpu"):
        return False
    if n_rows > max(ROWS, ROWS_BY_WIDTH // model.config.d_model):
        return False
    weights = (*model.parameters(), *model.buffers())
    if not kernels.usable(*weights, dtypes=kernels.FLOAT32):
        return False
    return all(w.is_contiguous() for w in weights) and all(map(_is_known, model.modules()))


def _is_known(part: nn.Module) -> bool:
    heard = part._forward_hooks or part._forward_pre_hooks
    plain = not isinstance(part, Router) or (part.moe.n_groups == part.moe.router_window == 1)
    return type(part) in PARTS and plain and not heard


class Step:
    """A forward pass of one token per row; `fits` says of which models."""

    def __init__(self, model: GPT):
        self.embedding, self.head = array(model.embedding.weight), array(model.head.weight)
        self.norm = _Norm(model.norm)
        self.layers = [_Layer(block, array(model.cos), array(model.sin)) for block in model.blocks]

    def __call__(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """The next logits (B, V), given each row's newest token; `cache.keep` must follow."""
        cache.read(1)
        places = array(cache.positions)[:, 0]
        x = self.embedding[np.asarray(tokens)]  # (B, D)
        for layer, past in zip(self.layers, cache.layers, strict=True):
            layer(x, places, past)
        return torch.from_numpy(_linear(self.norm(x), self.head))


def _run(kernel: Kernel, multiply_adds: int, *arguments: Any) -> None:
    (kernel if multiply_adds >= SHARED else kernel.alone)(*arguments)


def _linear(x: Array, weight: Array) -> Array:  # (B, I), (O, I) -> (B, O)
    y = np.empty((len(x), len(weight)), np.float32)
    _run(step_kernels.linear, len(x) * weight.size, x, weight, y)
    return y


class _Norm:
    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = array(norm.weight), np.float32(norm.eps)

    def __call__(self, x: Array) -> Array:  # (B, D) -> (B, D)
        y = np.empty_like(x)
        kernels.rms_norm_forward.alone(x, self.weight, self.eps, y)
        return y


class _Attention:
    def __init__(self, attention: Attention, cos: Array, sin: Array):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        self.q, self.k, self.v, self.o = (array(linear.weight) for linear in projections)
        self.head_size, self.tables = attention.head_size, (cos, sin)  # (T, C) each
        norms = [n for n in (attention.q_norm, attention.k_norm) if isinstance(n, RMSNorm)]
        self.norms = [array(norm.weight) for norm in norms] or [np.empty(0, np.float32)] * 2
        self.eps = np.float32(norms[0].eps if norms else 0)

    def __call__(self, x: Array, places: Array, past: LayerCache) -> Array:
        """(B, D) to (B, D), the rows' new tokens at `places` (B,)."""
        weights = (self.q, self.k, self.v)
        flat = [np.empty((len(x), len(weight)), np.float32) for weight in weights]
        _run(step_kernels.project, x.size * sum(map(len, weights)), x, *weights, *flat)
        q, k, v = (heads.reshape(len(x), -1, self.head_size) for heads in flat)
        keys, values = (_room(past, name, k.shape) for name in ("keys", "values"))
        scores = np.empty((*q.shape[:2], keys.shape[2]), np.float32)
        y, work = np.empty_like(q), 2 * SLOWER * q.size * past.cache.end
        where = (*self.norms, self.eps, *self.tables, places)
        _run(step_kernels.attention, work, q, k, v, *where, keys, values, scores, y)
        return _linear(y.reshape(len(x), -1), self.o)


def _room(past: LayerCache, name: str, shape: tuple[int, ...]) -> Array:
    """What is held, (B, G, R, C), with room for one more (B, G, C)."""
    if past.held[name].shape[-2] < past.cache.end:
        past.extend(name, torch.zeros(shape).unsqueeze(-2))
    return array(past.held[name])


class _Experts:
    """Feed-forward networks side by side, each with rows of its own; a dense one is one of them."""

    def __init__(self, first: Tensor, down: Tensor, gated: bool):
        self.first, self.down, self.gated = array(first), array(down), gated

    def add(self, rows: Array, starts: Array, token: Array, weight: Array, x: Array) -> None:
        """x[token[m]] += weight[m] * expert(rows[m]); starts (E + 1,): whose rows they are."""
        hidden = np.empty((len(rows), self.down.shape[2]), np.float32)
        product = np.empty((len(rows), self.first.shape[1]), np.float32)
        work = len(rows) * hidden.shape[1] * rows.shape[1]
        _run(step_kernels.expand, 2 * work, rows, starts, self.first, self.gated, product, hidden)
        product = np.empty_like(rows)
        _run(step_kernels.contract, work, hidden, starts, token, weight, self.down, product, x)


class _Dense:
    """One FFN for every token, weighed by a gate where there is one."""

    def __init__(self, ffn: Any, gate: nn.Linear | None = None):
        first = ffn.gate_up if ffn.gated else ffn.up
        self.experts = _Experts(first.weight[None], ffn.down.weight[None], ffn.gated)
        self.gate = None if gate is None else array(gate.weight)

    def __call__(self, normed: Array, x: Array) -> None:
        """x += ffn(normed), both (B, D)."""
        n = len(x)
        weight = np.ones((n, 1), np.float32)
        if self.gate is not None:
            weight = _linear(normed, self.gate)
            step_kernels.score.alone(weight, False)
        self.experts.add(normed, np.array([0, n]), np.arange(n), weight[:, 0], x)


class _Sparse:
    """The chosen experts; the choice is made by the kernel that the router has it from."""

    def __init__(self, moe: Any):
        router = moe.router
        n_experts, config = len(router.weight), router.moe
        self.weight, self.top_k = array(router.weight), config.top_k
        self.softmax, self.normalize = config.score == "softmax", router.normalize
        bias, scale = router.expert_bias, router.scale
        self.bias = None if bias is None else array(bias)
        self.scale = np.full(n_experts, router.factor, np.float32)
        if scale is not None:
            self.scale *= array(scale)
        width = -(-n_experts // kernels.LANES) * kernels.LANES
        self.places = np.arange(width, dtype=np.int32)
        self.keys = np.full((1, width), np.iinfo(np.int32).min, np.int32)
        self.experts: _Experts | OffloadedExperts = moe.experts
        if not isinstance(moe.experts, OffloadedExperts):
            first, down = moe.experts.weights
            self.experts = _Experts(first, down, moe.experts.gated)

    def __call__(self, normed: Array, x: Array) -> None:
        """x += what the chosen experts say of `normed`, both (B, D)."""
        scores = _linear(normed, self.weight)  # (B, E)
        step_kernels.score.alone(scores, self.softmax)
        ids = np.empty((len(x), self.top_k), np.int64)
        biased = scores if self.bias is None else scores + self.bias
        kernels.top_k.alone(biased, self.places, self.keys, ids)
        rows = np.empty((ids.size, x.shape[1]), np.float32)
        token, weight = np.empty(ids.size, np.int64), np.empty(ids.size, np.float32)
        starts = np.empty(len(self.scale) + 1, np.int64)
        given = (normed, scores, ids, self.scale, self.normalize)
        step_kernels.assign.alone(*given, rows, token, weight, starts)
        if isinstance(self.experts, _Experts):
            self.experts.add(rows, starts, token, weight, x)
        else:
            self._add_stored(self.experts, normed, (rows, token, weight), starts, x)

    def _add_stored(
        self,
        experts: OffloadedExperts,
        normed: Array,
        laid_out: tuple[Array, Array, Array],
        starts: Array,
        x: Array,
    ) -> None:
        """The same by one expert after the other, as they come from disk."""
        called = np.flatnonzero(np.diff(starts)).tolist()
        for expert, (first, down) in experts.each(called, torch.from_numpy(normed)):
            here = slice(starts[expert], starts[expert + 1])
            rows, token, weight = (part[here] for part in laid_out)
            alone = _Experts(first[None], down[None], experts.gated)
            alone.add(rows, np.array([0, len(rows)]), token, weight, x)


class _Layer:
    def __init__(self, block: Any, cos: Array, sin: Array):
        self.attention_norm, self.ffn_norm = _Norm(block.attention_norm), _Norm(block.ffn_norm)
        self.attention = _Attention(block.attention, cos, sin)
        if isinstance(block.ffn, FFN):
            self.ffns: list[_Dense | _Sparse] = [_Dense(block.ffn)]
        else:
            moe = block.ffn
            shared = [] if moe.shared is None else [_Dense(moe.shared, moe.shared_gate)]
            self.ffns = [_Sparse(moe), *shared]

    def __call__(self, x: Array, places: Array, past: LayerCache) -> None:
        """Adds what the layer says to `x` (B, D)."""
        x += self.attention(self.attention_norm(x), places, past)
        normed = self.ffn_norm(x)
        for ffn in self.ffns:
            ffn(normed, x)
