"""Routers: modules from hidden states to a `Routing`; one per way of choosing.

Shapes: B sequences, T time, N = B*T tokens, D d_model, E experts, K top_k, W router_window,
S positions held and new.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.model.cache import LayerCache
from nano_moe.model.ops import at_least_float32
from nano_moe.model.routing import (
    Routing,
    best_experts,
    count_tokens,
    experts_choose,
    gate_weights,
    hash_table,
    limit_to_groups,
    probabilities_of,
    scores_of,
)


class Scaling(nn.Module):
    """What every router does to its weights last: one fixed factor, and a learned one per expert.

    DeepSeek-V2 fixes the one at 16, V3 at 2.5; the other is Gemma 4's, and starts at 1.
    """

    scale: Tensor | None

    def __init__(self, moe: MoEConfig):
        super().__init__()
        self.factor = moe.routed_scaling_factor
        scale = nn.Parameter(torch.empty(moe.n_experts)) if moe.per_expert_scale else None
        self.register_parameter("scale", scale)

    def scaled(self, weights: Tensor, ids: Tensor) -> Tensor:  # (N, K), (N, K) -> (N, K)
        if self.scale is not None:
            weights = weights * self.scale.to(weights.dtype)[ids]
        return weights * self.factor


class Router(Scaling):
    """Linear scores, top-k selection, weights from the unbiased scores.

    Softmax over all experts, then top-k (Switch, eq. 1-2; Mixtral, sec. 2.1 with normalization),
    or sigmoid scores with a selection bias (DeepSeek-V3, eq. 12-16). `expert_bias` moves the
    selection only, never the weights; it is float32 whatever the model's dtype.
    """

    expert_bias: Tensor | None
    noise: Tensor | None

    def __init__(self, config: ModelConfig):
        assert config.moe is not None
        moe = config.moe
        super().__init__(moe)
        self.moe, self.normalize = moe, moe.normalizes
        shape = (moe.n_experts, moe.router_window * config.d_model)  # (E, W*D)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=moe.train_router)
        self.register_parameter(
            "noise", nn.Parameter(torch.empty(shape)) if moe.noisy_top_k else None
        )
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

    def logits(self, x: Tensor, past: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (N, E), in at least float32; jitter and noise in training only.

        Jitter scales the router's own input (Fedus et al. 2021, app. C); noise has a learned
        spread per expert (Shazeer et al. 2017, eq. 4).
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = at_least_float32(x)
            if self.training and self.moe.router_jitter:
                jitter = self.moe.router_jitter
                wide = wide * torch.empty_like(wide).uniform_(1 - jitter, 1 + jitter)
            seen = self._seen(wide, past).flatten(0, -2)  # (N, W*D)
            logits = F.linear(seen, self.weight.to(wide.dtype))
            if self.training and self.noise is not None:
                spread = F.softplus(F.linear(seen, self.noise.to(wide.dtype)))
                logits = logits + torch.randn_like(logits) * spread
            return logits

    def _seen(self, x: Tensor, past: LayerCache | None) -> Tensor:  # (B, T, D) -> (B, T, W*D)
        width = self.moe.router_window
        if past is None or width == 1:
            return causal_window(x, width)
        held = past.extend("router", x)  # (B, S, D)
        newest_first = past.cache.positions.unsqueeze(-1) - torch.arange(width, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        windows = held[rows, newest_first.clamp_min(0)]  # (B, T, W, D)
        return windows.mul(newest_first.ge(0).unsqueeze(-1)).flatten(-2)

    def select(self, scores: Tensor) -> Tensor:  # (N, E) -> (N, K)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if self.moe.n_groups > 1:
            scores = limit_to_groups(
                scores, self.moe.n_groups, self.moe.top_k_groups, self.moe.group_score
            )
        return best_experts(scores, self.moe.top_k)

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, past: LayerCache | None = None
    ) -> Routing:  # (B, T, D), (B, T)
        logits = self.logits(x, past)
        scores = scores_of(logits, self.moe.score)
        ids = self.select(scores.detach())
        weights = gate_weights(scores.gather(-1, ids), self.normalize)
        return Routing(
            ids=ids,
            weights=self.scaled(weights, ids),
            probs=probabilities_of(scores, self.moe.score),
            logits=logits,
            counts=count_tokens(ids.flatten(), self.moe.n_experts),
        )


class ExpertChoiceRouter(Router):
    """Experts take their favourite tokens: balanced by design, and it sees the future.

    Every expert takes N*K/E tokens of the batch. A demonstration: its training loss is no
    language-modelling loss, and evaluation and sampling refuse it. All N*E pairs are laid out, so
    it takes E/K times the memory that it needs. Zhou et al. 2022, sec. 3.2.
    """

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, past: LayerCache | None = None
    ) -> Routing:  # (B, T, D)
        logits = self.logits(x, past)
        scores = scores_of(logits, self.moe.score)
        n_tokens, n_experts = scores.shape
        kept = experts_choose(scores.detach(), max(1, n_tokens * self.moe.top_k // n_experts))
        ids = torch.arange(n_experts, device=x.device).expand_as(scores)
        return Routing(
            ids=ids,
            weights=self.scaled(scores, ids),
            probs=probabilities_of(scores, self.moe.score),
            logits=logits,
            counts=kept.sum(0),
            kept=kept,
        )


class HashRouter(Scaling):
    """A fixed hash of the token's id chooses, with equal weights: the baseline without learning.

    Roller et al. 2021 (Hash Layers).
    """

    table: Tensor
    expert_bias = None

    def __init__(self, config: ModelConfig, layer: int):
        assert config.moe is not None
        super().__init__(config.moe)
        self.n_experts, top_k = config.moe.n_experts, config.moe.top_k
        table = hash_table(config.vocab_size, self.n_experts, top_k, layer)
        self.register_buffer("table", table)  # (V, K)

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, past: LayerCache | None = None
    ) -> Routing:  # (B, T, D), (B, T)
        assert tokens is not None, "a hash router needs the tokens' ids"
        ids = self.table[tokens.flatten()]  # (N, K)
        weights = torch.full_like(ids, 1, dtype=at_least_float32(x).dtype) / ids.shape[-1]
        probs = weights.new_zeros(len(ids), self.n_experts).scatter(-1, ids, weights)
        return Routing(
            ids=ids,
            weights=self.scaled(weights, ids),
            probs=probs,
            logits=probs.log(),
            counts=count_tokens(ids.flatten(), self.n_experts),
        )


def causal_window(x: Tensor, width: int) -> Tensor:
    """Each position beside its predecessors, newest first, zeros before the start.

    (B, T, D) to (B, T, W*D).
    """
    if width == 1:
        return x
    oldest_first = F.pad(x, (0, 0, width - 1, 0)).unfold(-2, width, 1)  # (B, T, D, W)
    return oldest_first.flip(-1).mT.flatten(-2)


def make_router(config: ModelConfig, layer: int) -> Router | HashRouter:
    """The router that the recipe's `moe.routing` names."""
    assert config.moe is not None
    if config.moe.routing == "hash":
        return HashRouter(config, layer)
    return ExpertChoiceRouter(config) if config.moe.routing == "expert_choice" else Router(config)
