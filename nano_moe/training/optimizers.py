"""One optimizer for all weights: Muon for hidden matrices, AdamW for the rest.

A single `torch.optim.Optimizer`, so that clipping, accumulation, schedules and checkpoints of the
trainer work unchanged. Policies, each tested:

- Embeddings, head, norms and routers are not decayed; hidden matrices and experts are.
- Routers and the gates of shared experts have a learning rate of their own and are always AdamW's.
- An expert whose gradient is zero in a step (no token chose it) is left as it is, weights and
  state: Muon would turn its stale momentum into a full-size step, AdamW would shrink it.

Shapes: S matrices of one shape (m, n), m rows, n columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nano_moe.config import OptimConfig
from nano_moe.device import native_bf16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024 (Muon)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_BYTES = 8 * 2**20  # of one batch on a CPU: so many stay in the cache
MATCH_RMS_ADAMW = 0.2  # Liu et al. 2025, sec. 2.2: gives Muon's update AdamW's typical size


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split named parameters into `hidden`, `router` and `embedding` groups, each exactly once."""
    embedding_lr = config.embedding_lr or config.lr
    router_lr = config.router_lr or embedding_lr
    muon, decay = config.name == "muon", config.weight_decay
    groups = {
        "hidden": {"lr": config.lr, "weight_decay": decay, "muon": muon},
        "router": {"lr": router_lr, "weight_decay": 0.0, "muon": False},
        "embedding": {"lr": embedding_lr, "weight_decay": 0.0, "muon": False},
    }
    members: dict[str, dict[str, Tensor]] = {name: {} for name in groups}
    for name, parameter in model.named_parameters():
        members[_group_of(name, parameter)][name] = parameter
    grouped = [id(p) for named in members.values() for p in named.values()]
    everything = [id(p) for p in model.parameters()]
    assert sorted(grouped) == sorted(everything), "each parameter belongs to exactly one group"
    return [
        {
            "name": name,
            "params": list(members[name].values()),
            "fused": ["gate_up" in parameter for parameter in members[name]],
            **options,
        }
        for name, options in groups.items()
        if members[name]
    ]


def _group_of(name: str, parameter: Tensor) -> str:
    if "router" in name or "shared_gate" in name:
        return "router"
    if "embedding" in name or "head" in name or parameter.ndim < 2:
        return "embedding"
    return "hidden"


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `muon` take Muon steps, the others AdamW steps (both with decoupled decay)."""

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig):
        defaults = {
            "beta1": config.beta1,
            "beta2": config.beta2,
            "momentum": config.momentum,
            "eps": 1e-8,
        }
        super().__init__(groups, defaults)
        self._precision = config.newton_schulz

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._muon(group)
            else:
                for parameter in group["params"]:
                    self._adamw(parameter, group)
        return loss

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Loshchilov & Hutter 2019, algorithm 2."""
        if parameter.grad is None:
            return
        grad, state = parameter.grad, self.state[parameter]
        if not state:
            state["step"] = grad.new_zeros(grad.shape[:1] + (1, 1) if grad.ndim == 3 else ())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        live = _live(grad)
        state["step"] += 1 if live is None else live  # an expert's own steps correct its moments
        beta1, beta2, step = group["beta1"], group["beta2"], state["step"].clamp_min(1)
        _lerp(state["exp_avg"], grad, 1 - beta1, live)
        _lerp(state["exp_avg_sq"], grad.square(), 1 - beta2, live)
        average = state["exp_avg"] / (1 - beta1**step)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (average / denominator).add_(parameter, alpha=group["weight_decay"])
        parameter.sub_(update if live is None else update * live, alpha=group["lr"])

    def _muon(self, group: dict[str, Any]) -> None:
        """Nesterov momentum, orthogonalized; same-shaped matrices share one batched iteration."""
        batches: dict[tuple[int, int], list[Update]] = defaultdict(list)
        for parameter, fused in zip(group["params"], group["fused"], strict=True):
            if parameter.grad is None:
                continue
            grad, state = parameter.grad, self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            live = _live(grad)
            _lerp(state["momentum"], grad, 1 - group["momentum"], live)
            direction = grad.lerp(state["momentum"], group["momentum"])
            for update in _matrices(parameter, direction, live, fused):
                batches[update.direction.shape[-2], update.direction.shape[-1]].append(update)
        decay = group["lr"] * group["weight_decay"]
        for (rows, columns), updates in batches.items():
            stacked = torch.cat([u.direction.reshape(-1, rows, columns) for u in updates])
            dtype, piece = self._newton_schulz_dtype(stacked), _piece(stacked)
            steps = torch.cat([orthogonalize(part, dtype) for part in stacked.split(piece)])
            _apply(updates, steps, group["lr"] * MATCH_RMS_ADAMW * columns**0.5, decay)

    def _newton_schulz_dtype(self, x: Tensor) -> torch.dtype:
        if x.dtype == torch.float64:
            return torch.float64
        bf16 = self._precision == "bf16" or (self._precision == "auto" and native_bf16(x.device))
        return torch.bfloat16 if bf16 else torch.float32


def _piece(stacked: Tensor) -> int:
    """How many matrices to iterate on at once."""
    if stacked.device.type != "cpu":
        return len(stacked)
    return max(1, NEWTON_SCHULZ_BYTES // (stacked[0].numel() * stacked.element_size()))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values land in about [0.7, 1.2].

    (S, m, n) with m <= n to (S, m, n) in `dtype`. Newton-Schulz, Jordan et al. 2024 (Muon).
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Update(NamedTuple):
    """One matrix, or E stacked ones, on the way through the iteration; views, never copies."""

    weight: Tensor  # (..., m, n), written in place
    direction: Tensor  # (..., m, n), momentum to orthogonalize
    live: Tensor | None  # (E, 1, 1), 0 for an expert to leave alone


def _matrices(
    parameter: Tensor, direction: Tensor, live: Tensor | None, fused: bool
) -> Iterator[Update]:
    """Split a fused gate_up product in two, and lay every matrix with m <= n."""
    pieces = 2 if fused else 1
    pairs = zip(parameter.chunk(pieces, dim=-2), direction.chunk(pieces, dim=-2), strict=True)
    for weight, piece in pairs:
        if weight.shape[-2] > weight.shape[-1]:
            weight, piece = weight.mT, piece.mT
        yield Update(weight, piece, live)


def _live(grad: Tensor) -> Tensor | None:
    """For stacked experts (E, m, n): which got any gradient, (E, 1, 1); else None."""
    if grad.ndim < 3:
        return None
    return (grad.abs().amax(dim=(-2, -1), keepdim=True) > 0).to(grad.dtype)


def _lerp(average: Tensor, value: Tensor, weight: float, live: Tensor | None) -> None:
    average.lerp_(value, weight if live is None else live * weight)


def _apply(updates: list[Update], steps: Tensor, scale: float, decay: float) -> None:
    start = 0
    for weight, direction, live in updates:
        n = direction.numel() // (direction.shape[-2] * direction.shape[-1])
        step = steps[start : start + n].view(direction.shape).to(weight.dtype)
        start += n
        if live is None:
            weight.mul_(1 - decay).sub_(step, alpha=scale)
        else:
            weight.sub_(live * (weight * decay + step * scale))
