"""The decoder: pre-norm blocks whose FFN is dense or sparse by the recipe.

Shapes: B batch, T time, D d_model, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nano_moe.config import ModelConfig
from nano_moe.model.attention import Attention, rope_tables
from nano_moe.model.ffn import FFN
from nano_moe.model.latent_attention import LatentAttention
from nano_moe.model.moe import MoE
from nano_moe.model.ops import RMSNorm
from nano_moe.model.router import HashRouter, Router
from nano_moe.model.routing import Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config) if config.mla is None else LatentAttention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn: nn.Module
        if config.is_sparse(layer):
            self.ffn = MoE(config, layer)
        else:
            self.ffn = FFN(config.d_model, config.d_ff, config.activation)

    def forward(
        self, x: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, routing = self.ffn(self.ffn_norm(x), tokens)
        return x + y, routing


class GPT(nn.Module):
    """Tokens to next-token logits, and each sparse layer's routing.

    With `activation_checkpointing` a block's inside is computed again in the backward pass. The
    routing that is returned is that of the first pass alone, so nothing is counted twice.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rope_tables(config.context, config.rope_size, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def routers(self) -> list[Router | HashRouter]:
        """The router of each sparse layer, in order."""
        return [block.ffn.router for block in self.blocks if isinstance(block.ffn, MoE)]

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing | None]]:
        """tokens (B, T) int64 to logits (B, T, V), and per layer its routing (None: dense).

        Raises ValueError when T is longer than the recipe's context.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens are more than context={self.config.context}")
        x = self.embedding(tokens)  # (B, T, D)
        routings: list[Routing | None] = []
        for block in self.blocks:
            inputs = (x, tokens, self.cos[:length], self.sin[:length])
            if self.activation_checkpointing and self.training:
                x, routing = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, routing = block(*inputs)
            routings.append(routing)
        return self.head(self.norm(x)), routings


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> GPT:
    """Draw every parameter from a generator of its own, seeded by (seed, name).

    Norms and per-expert scales are 1, the router's noise weights 0 (Shazeer et al. 2017, app. A).
    Matrices are N(0, init_std), except the projections that write to the residual
    stream (attention output, every FFN, expert and shared-expert down-projection), which are
    N(0, init_std / sqrt(2 n_layers)) (Radford et al. 2019, sec. 2.3). Since a draw depends on
    nothing but seed, name and shape, a dense and a sparse model of one seed share bitwise equal
    embeddings, attention and norms.
    """
    residual_std = model.config.init_std / (2 * model.config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("router.scale"):
            parameter.fill_(1.0)
            continue
        if name.endswith("router.noise"):
            parameter.zero_()
            continue
        writes_residual = name.endswith(("o_proj.weight", "down", "down.weight"))
        std = residual_std if writes_residual else model.config.init_std
        generator = torch.Generator().manual_seed(_parameter_seed(seed, name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def _parameter_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch seeds are signed 64-bit
