"""Routing: which experts a token visits, and with what weight.

Shapes: N tokens, D d_model, E experts, K top_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.config import ModelConfig
from nano_moe.model.ops import at_least_float32


class Routing(NamedTuple):
    """What one sparse layer decided for N tokens; everything at least float32."""

    ids: Tensor  # (N, K) int64, the chosen experts, best first
    weights: Tensor  # (N, K), what each expert's output is multiplied by
    probs: Tensor  # (N, E), scores over all experts, summing to 1 per token
    logits: Tensor  # (N, E)
    counts: Tensor  # (E,) int64, tokens per expert; sums to N * K


def scores_of(logits: Tensor, kind: str) -> Tensor:
    """Router logits to scores in [0, 1]: (N, E) -> (N, E)."""
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def probabilities_of(scores: Tensor, kind: str) -> Tensor:
    """Scores to a distribution over experts: (N, E) -> (N, E). Softmax scores are one already.

    The floor only guards 0/0; a larger one would let the router lower the balancing loss by
    shrinking all its scores.
    """
    if kind == "softmax":
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def gate_weights(chosen: Tensor, normalize: bool) -> Tensor:
    """Weights of the chosen experts from their scores: (N, K) -> (N, K)."""
    if not normalize:
        return chosen
    return chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def count_tokens(ids: Tensor, n_experts: int) -> Tensor:
    """Tokens per expert, (N, K) -> (E,), without a data-dependent shape."""
    flat = ids.reshape(-1)
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


class Router(nn.Module):
    """Linear scores, top-k selection, weights from the unbiased scores.

    Softmax over all experts, then top-k (Switch, eq. 1-2; Mixtral, sec. 2.1 with normalization),
    or sigmoid scores with a selection bias (DeepSeek-V3, eq. 12-16). `expert_bias` moves the
    selection only, never the weights; it is float32 whatever the model's dtype.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.top_k, self.score, self.normalize = moe.top_k, moe.score, moe.normalizes
        self.weight = nn.Parameter(torch.empty(moe.n_experts, config.d_model))  # (E, D)
        bias = torch.zeros(moe.n_experts) if moe.bias_update_rate > 0 else None
        self.register_buffer("expert_bias", bias)

    def _apply(self, fn, recurse=True):
        """Casting the model leaves the bias in float32: bf16 cannot add steps of 1e-3 to 0.6."""
        exact = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if exact is not None and moved is not None and moved.dtype != torch.float32:
            self.expert_bias = exact.to(moved.device)
        return self

    def logits(self, x: Tensor) -> Tensor:  # (N, D) -> (N, E)
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_float32(x)
            return F.linear(wide, self.weight.to(wide.dtype))

    def forward(self, x: Tensor) -> Routing:  # (N, D)
        logits = self.logits(x)
        scores = scores_of(logits, self.score)
        selection = scores.detach()
        if self.expert_bias is not None:
            selection = selection + self.expert_bias
        ids = selection.topk(self.top_k, dim=-1).indices
        weights = gate_weights(scores.gather(-1, ids), self.normalize)
        return Routing(
            ids=ids,
            weights=weights,
            probs=probabilities_of(scores, self.score),
            logits=logits,
            counts=count_tokens(ids, scores.shape[-1]),
        )
