"""One optimizer for all weights: Muon for hidden matrices, AdamW for the rest.

A single `torch.optim.Optimizer`, so that clipping, accumulation, schedules and checkpoints of the
trainer work unchanged. Policies, each tested:

- Embeddings, head, norms and routers are not decayed; hidden matrices and experts are.
- Routers and the gates of shared experts have a learning rate of their own and are always AdamW's.
- Muon orthogonalizes whole matrices: of one that lies in parts, the parts of its direction are
  gathered, and each process moves its own rows.
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
from nano_moe.training import elementwise
from nano_moe.training.layouts import by_rows_of_matrices, gathered, local, part_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024 (Muon)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_BYTES = 8 * 2**20  # of one batch on a CPU: so many stay in the cache
HIDDEN = ("attention", "ffn")  # parts of a block whose matrices are Muon's, experts included
MATCH_RMS_ADAMW = 0.2  # Liu et al. 2025, sec. 2.2: gives Muon's update AdamW's typical size


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split named parameters into `hidden`, `router` and `embedding` groups, each exactly once.

    Routed experts are a group of their own, `experts`, where they have a rate of their own.
    """
    embedding_lr = config.embedding_lr or config.lr
    router_lr = config.router_lr or embedding_lr
    muon, decay = config.name == "muon", config.weight_decay
    groups: dict[str, dict[str, Any]] = {
        "hidden": {"lr": config.lr, "weight_decay": decay, "muon": muon},
        "experts": {"lr": config.expert_lr, "weight_decay": decay, "muon": muon},
        "router": {"lr": router_lr, "weight_decay": 0.0, "muon": False},
        "embedding": {"lr": embedding_lr, "weight_decay": 0.0, "muon": False},
    }
    members: dict[str, dict[str, Tensor]] = {name: {} for name in groups}
    for name, parameter in model.named_parameters():
        group = _group_of(name, parameter)
        own = group == "hidden" and ".experts." in name and config.expert_lr is not None
        members["experts" if own else group][name] = parameter
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
    if any(f".{part}." in name for part in HIDDEN):
        return "hidden"
    raise AssertionError(f"{name}: say in {__name__} which rate and decay it has")


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
        state = self.state[parameter]
        if not state:
            stacked = parameter.ndim > 2
            each = parameter[:, :1, :1] if stacked else local(parameter).new_zeros(())
            state["step"] = torch.zeros_like(each)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if local(parameter).numel() == 0:
            return  # all of it lies elsewhere
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weight, grad, average, square = (_stacks(local(x)) for x in tensors)
        live = elementwise.nonzero(grad) if parameter.ndim > 2 else None
        # An expert's own steps correct its moments.
        step = local(state["step"]).view(-1).add_(1 if live is None else live)
        moments = elementwise.Moments(average, square, step)
        elementwise.adamw(weight, grad, moments, group, live=live)

    def _muon(self, group: dict[str, Any]) -> None:
        """Same-shaped matrices share one batched iteration."""
        batches: dict[torch.Size, list[Update]] = defaultdict(list)
        for parameter, fused in zip(group["params"], group["fused"], strict=True):
            if parameter.grad is None:
                continue
            state, pieces = self.state[parameter], 2 if fused else 1
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            if by_rows_of_matrices(parameter):
                self._muon_gathered(parameter, pieces, group)
                continue
            if local(parameter).numel() == 0:
                continue  # all of it lies elsewhere
            tensors = (parameter, parameter.grad, state["momentum"])
            weight, grad, average = (_stacks(local(x), pieces) for x in tensors)
            update = Update(weight, grad, average, _live(grad, parameter))
            batches[weight.shape[1:]].append(update)
        for updates in batches.values():
            for piece in _pieces(updates):
                self._muon_together(piece, group)

    def _muon_gathered(self, parameter: Any, pieces: int, group: dict[str, Any]) -> None:
        """A matrix of which each process holds rows: whole on all, for its iteration alone."""
        tensors = (parameter, parameter.grad, self.state[parameter]["momentum"])
        weight, grad, momentum = (local(x) for x in tensors)
        momentum.lerp_(grad, 1 - group["momentum"])
        ahead = gathered(grad.lerp(momentum, group["momentum"]), parameter)
        stack = _stacks(ahead, pieces)
        direction = (stack / elementwise.norms(stack)).to(self._newton_schulz_dtype(ahead))
        steps = newton_schulz(direction)
        rows = local(part_of(steps.view_as(ahead), parameter))
        if len(rows):
            live = ahead.new_ones(1)
            elementwise.move(_stacks(weight), _stacks(rows), live, *_rates(steps, group))

    def _muon_together(self, updates: list[Update], group: dict[str, Any]) -> None:
        """Nesterov momentum, orthogonalized."""
        dtype = self._newton_schulz_dtype(updates[0].weight)
        directions = [
            elementwise.direction(u.grad, u.momentum, u.live, group["momentum"], dtype)
            for u in updates
        ]
        steps = newton_schulz(torch.cat(directions) if len(updates) > 1 else directions[0])
        rate, decay = _rates(steps, group)
        parts = steps.split([len(u.weight) for u in updates])
        for update, step in zip(updates, parts, strict=True):
            elementwise.move(update.weight, step, update.live, rate, decay)

    def _newton_schulz_dtype(self, x: Tensor) -> torch.dtype:
        if x.dtype == torch.float64:
            return torch.float64
        bf16 = self._precision == "bf16" or (self._precision == "auto" and native_bf16(x.device))
        return torch.bfloat16 if bf16 else torch.float32


def _rates(steps: Tensor, group: dict[str, Any]) -> tuple[float, float]:
    """Of a step of matrices (S, m, n), and of the decay."""
    rate = group["lr"] * MATCH_RMS_ADAMW * max(steps.shape[1:]) ** 0.5
    return rate, group["lr"] * group["weight_decay"]


def newton_schulz(x: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values land in about [0.7, 1.2].

    From matrices (S, m, n) of Frobenius norm 1, in their dtype. Jordan et al. 2024 (Muon): x goes
    to (a + b A + c A^2) x, A = x x^T; the polynomial is one matrix, so that x is only multiplied,
    never copied. Tall matrices are multiplied from the right, by polynomials in x^T x.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = x @ polynomial if tall else polynomial @ x
    return x


class Update(NamedTuple):
    """Matrices on the way through the iteration, S of one parameter; views, never copies."""

    weight: Tensor  # (S, m, n), written in place
    grad: Tensor  # (S, m, n)
    momentum: Tensor  # (S, m, n), written in place
    live: Tensor  # (S,), 0 for an expert to leave alone

    def part(self, start: int, stop: int) -> Update:
        return Update(*(tensor[start:stop] for tensor in self))


def _stacks(x: Tensor, pieces: int = 1) -> Tensor:
    """A parameter, or its gradient, as matrices (S, m, n); a fused gate_up product is two."""
    rows = x.shape[-2] // pieces if x.ndim > 1 else 1
    return x.view(-1 if x.ndim > 2 or pieces > 1 else 1, rows, x.shape[-1])


def _pieces(updates: list[Update]) -> Iterator[list[Update]]:
    """As many matrices at once as the cache holds, of several parameters or a part of one's."""
    weight = updates[0].weight
    most = max(1, NEWTON_SCHULZ_BYTES // (weight[0].numel() * weight.element_size()))
    if weight.device.type != "cpu":
        most = sum(len(update.weight) for update in updates)
    piece: list[Update] = []
    room = most
    for update in updates:
        start, end = 0, len(update.weight)
        while start < end:
            stop = min(start + room, end)
            piece.append(update.part(start, stop))
            room, start = room - (stop - start), stop
            if room == 0:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


def _live(grad: Tensor, parameter: Tensor) -> Tensor:
    """Which matrices of stacked experts got any gradient, (S,): 1 or 0. Others always do."""
    if parameter.ndim < 3:
        return grad.new_ones(len(grad))
    return elementwise.nonzero(grad)
