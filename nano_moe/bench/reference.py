"""A GPT-2-shaped character model as widely taught: what `recipes/char.yaml` is measured against.

LayerNorm, GELU, learned positions, tied embeddings, biases, AdamW with a cosine from 1e-3 to 1e-4.

Shapes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """The CPU budget of nanoGPT's README: about 1.5 million characters."""

    n_layers: int = 4
    n_heads: int = 4
    width: int = 128
    block: int = 64
    batch: int = 12
    steps: int = 2000
    warmup: int = 100
    lr: float = 1e-3
    min_lr: float = 1e-4

    def windows(self, text: Tensor, generator: torch.Generator) -> Tensor:  # (n,) -> (B, T + 1)
        starts = torch.randint(len(text) - self.block, (self.batch,), generator=generator)
        return torch.stack([text[start : start + self.block + 1] for start in starts])


class ReferenceBlock(nn.Module):
    def __init__(self, budget: Budget):
        super().__init__()
        self.n_heads, width = budget.n_heads, budget.width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class ReferenceGPT(nn.Module):
    def __init__(self, vocab: int, budget: Budget):
        super().__init__()
        self.tokens = nn.Embedding(vocab, budget.width)
        self.positions = nn.Embedding(budget.block, budget.width)
        self.blocks = nn.ModuleList(ReferenceBlock(budget) for _ in range(budget.n_layers))
        self.norm = nn.LayerNorm(budget.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * budget.n_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class ReferenceStep:
    """A fresh reference decoder and its optimizer."""

    def __init__(self, vocab: int, budget: Budget, seed: int):
        torch.manual_seed(seed)
        self.model, self.budget, self.taken = ReferenceGPT(vocab, budget), budget, 0
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=budget.lr, betas=(0.9, 0.99), fused=True)

    def run(self, windows: Tensor) -> float:  # (B, T + 1)
        """Take a step; its seconds."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.taken, self.budget)
        logits = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.taken += 1
        return time.perf_counter() - start


def train_reference(train: Tensor, vocab: int, budget: Budget, seed: int) -> ReferenceGPT:
    """Random windows of `train` (n,) for the whole budget; the trained model."""
    one, generator = ReferenceStep(vocab, budget, seed), torch.Generator().manual_seed(seed)
    for _ in range(budget.steps):
        one.run(budget.windows(train, generator))
    return one.model.eval()


@torch.no_grad()
def score_reference(model: ReferenceGPT, text: Tensor, budget: Budget) -> float:
    """Mean nats over all of `text` (n,) but its first token, in non-overlapping windows."""
    nats = 0.0
    for start in range(0, len(text) - 1, budget.block):
        window = text[start : start + budget.block + 1]
        logits = model(window[None, :-1])[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats / (len(text) - 1)


def _rate(step: int, budget: Budget) -> float:
    if step < budget.warmup:
        return budget.lr * (step + 1) / budget.warmup
    progress = (step - budget.warmup) / (budget.steps - budget.warmup)
    return budget.min_lr + 0.5 * (budget.lr - budget.min_lr) * (1 + math.cos(math.pi * progress))
