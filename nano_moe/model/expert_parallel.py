"""Expert parallelism: routed experts shared out over the ranks of a group, tokens sent to them.

How to use it, on every rank of a job whose model is the same everywhere:

    mesh = parallel_mesh(expert_ranks)                # (data, expert) ranks
    shard_experts(model, mesh["expert"].get_group())  # before the optimizer is made
    loss_of_own_batch.backward()                      # on every rank, equally often
    average_gradients(model, mesh)                    # now those of the mean loss over all ranks
    state = full_state_dict(model)                    # on every rank; as one process has it
    model.load_state_dict(state)                      # each rank takes its part

What it rests on:

- Each rank reads sequences of its own, and holds E/R consecutive experts of every sparse layer; all
  else (router, shared experts, attention, ...) is replicated. Parameters keep their names.
- A token goes once to each rank that holds any of its experts, with its weights, and the weighted
  sum of those experts comes back once. Sums are added rank by rank, in their order. Under autocast
  tokens travel in the dtype that products run in, sums in that of the residual stream, so nothing
  is rounded that one process would not round.
- A forward and a backward pass are collective: a rank that leaves one out stops all others. A rank
  without tokens, or whose experts get none, takes part with empty rows.
- A backward pass leaves in an expert's gradient what all ranks of its group sent it: the sum over
  ranks of the gradients of their losses. Where the loss is the mean over ranks, as under data
  parallelism, an expert's gradient is therefore to be divided by the expert ranks, R, and averaged
  over the data ranks; all others are to be averaged over all ranks. `average_gradients` does both,
  `average_expert_gradients` the first alone, for engines that do the second themselves. A norm of
  all gradients adds the squares of `sharded_parameters` over the expert ranks.

Shapes: R ranks of the expert group, N tokens of this rank, D d_model, E experts, K top_k, M rows
that this rank sends (the tokens' copies, one per rank that a token needs), P rows that it receives.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from nano_moe.errors import UserError
from nano_moe.model.experts import Experts
from nano_moe.model.moe import MoE
from nano_moe.model.ops import compute_dtype
from nano_moe.model.router import ExpertChoiceRouter
from nano_moe.model.routing import Routing, count_tokens

ELSEWHERE = -1  # in place of the number of an expert that another rank holds, or that was dropped


class Traffic(NamedTuple):
    """What one forward pass of one layer makes this rank send to others, and its backward pass."""

    rows_out: int  # copies of own tokens for experts elsewhere
    rows_in: int  # others' tokens for own experts
    forward_bytes: int
    backward_bytes: int


class Exchange:
    """Rows between the ranks of a group; `move` is the one place where they travel."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """As `move`, with a gradient that travels back."""
        return Moved.apply(rows, self, send, receive)

    def move(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """The first send[0] rows to rank 0, and so on; receive[r] rows came from rank r."""
        return wait_tensor(all_to_all_single(rows.contiguous(), receive, send, self.group))

    def abroad(self, counts: list[int]) -> int:
        """How many of the rows are for, or from, other ranks."""
        return sum(counts) - counts[self.rank]


class Moved(torch.autograd.Function):
    """Rows that travelled; their gradients travel back the same way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, exchange: Exchange, send: list[int], receive: list[int]
    ) -> Tensor:
        ctx.back = exchange, receive, send
        return exchange.move(rows, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        exchange, send, receive = ctx.back
        return exchange.move(gradients[0], send, receive), None, None, None


class Load(NamedTuple):
    """The rows that a rank sends, those for rank 0 first."""

    token: Tensor  # (M,), whose they are
    ids: Tensor  # (M, K) int32, experts by their number on the rank that holds them, or ELSEWHERE
    weights: Tensor  # (M, K)
    counts: Tensor  # (R,) int64, rows for each rank


def pack(routing: Routing, n_ranks: int) -> Load:
    """One row for each token and rank that holds an expert of its: assignments (N, K) to M rows."""
    per_rank = len(routing.counts) // n_ranks
    owner = routing.ids // per_rank  # (N, K)
    if routing.kept is not None:
        owner = owner.masked_fill(~routing.kept, n_ranks)
    needed = torch.zeros(len(owner), n_ranks + 1, dtype=torch.bool, device=owner.device)
    needed = needed.scatter(1, owner, True)[:, :n_ranks]  # (N, R)
    rank, token = needed.T.nonzero(as_tuple=True)
    there = owner[token] == rank.unsqueeze(1)
    ids = (routing.ids[token] - per_rank * rank.unsqueeze(1)).masked_fill(~there, ELSEWHERE)
    weights = routing.weights.index_select(0, token)
    return Load(token, ids.to(torch.int32), weights, needed.sum(0))


def unpack(ids: Tensor, weights: Tensor, n_experts: int) -> Routing:
    """(P, K) ids and weights that came, as the routing of P tokens among `n_experts`, those here.

    Dispatch reads no scores, and none came.
    """
    kept, local = ids != ELSEWHERE, ids.clamp_min(0).to(torch.int64)
    counts = count_tokens(local.masked_fill(~kept, n_experts).flatten(), n_experts + 1)[:-1]
    none = weights.new_empty(len(ids), 0)
    return Routing(local, weights, probs=none, logits=none, counts=counts, kept=kept)


class ShardedExperts(Experts):
    """This rank's E/R of a layer's experts, for the tokens of all ranks of the group."""

    def __init__(self, whole: Experts, group: ProcessGroup):
        nn.Module.__init__(self)
        self.activation, self.gated, self.backend = whole.activation, whole.gated, whole.backend
        self.n_experts, self.exchange = len(whole.down), Exchange(group)
        for name, weight in whole.named_parameters():
            own = own_rows(weight.detach(), group).clone()
            self.register_parameter(name, nn.Parameter(own, weight.requires_grad))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:  # (N, D) -> (N, D)
        return self.exchanged(x, routing)[0]

    def exchanged(self, x: Tensor, routing: Routing) -> tuple[Tensor, Traffic]:
        """(N, D) -> (N, D), and what that sends to other ranks."""
        exchange, load = self.exchange, pack(routing, self.exchange.size)
        ones = [1] * exchange.size
        came = exchange.move(load.counts, ones, ones)
        send, receive = torch.stack([load.counts, came]).tolist()
        rows = x.index_select(0, load.token).to(compute_dtype(x))  # (M, D)
        there = exchange(rows, send, receive).to(x.dtype)  # (P, D)
        ids = exchange.move(load.ids, send, receive)
        weights = exchange(load.weights, send, receive)
        done = super().forward(there, unpack(ids, weights, len(self.down)))
        back, y = exchange(done, receive, send), torch.zeros_like(x)  # (M, D), (N, D)
        for token, part in zip(load.token.split(send), back.split(send), strict=True):
            y = y.index_add(0, token, part)  # a token comes once from a rank: in a fixed order
        return y, self._traffic(load, rows, back, send, receive)

    def _traffic(
        self, load: Load, rows: Tensor, back: Tensor, send: list[int], receive: list[int]
    ) -> Traffic:
        rows_out, rows_in = self.exchange.abroad(send), self.exchange.abroad(receive)
        outward = rows, load.weights
        forward = (self.exchange.size - 1) * load.counts.itemsize
        forward += rows_out * sum(map(_row_bytes, (*outward, load.ids)))
        forward += rows_in * _row_bytes(back)
        backward = rows_in * sum(_row_bytes(x) for x in outward if x.requires_grad)
        backward += rows_out * _row_bytes(back) if back.requires_grad else 0
        return Traffic(rows_out, rows_in, forward, backward)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Of a state dict of one process, take this rank's experts."""
        for name, weight in self.named_parameters():
            whole = state_dict.get(prefix + name)
            if whole is not None and len(whole) == self.n_experts != len(weight):
                state_dict[prefix + name] = own_rows(whole, self.exchange.group)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.itemsize


# --- a whole model -------------------------------------------------------------------------------


def parallel_mesh(
    expert_ranks: int, device_type: str = "cpu", patience: timedelta | None = None
) -> DeviceMesh:
    """All ranks of the job as a mesh ("data", "expert"): neighbours share out the experts.

    `patience` is that of groups which are a part of the job, with a rank that they wait for
    (omitted: PyTorch's). Raises UserError where the ranks are no multiple of `expert_ranks`.
    """
    ranks = dist.get_world_size()
    if expert_ranks < 1 or ranks % expert_ranks:
        raise UserError(
            f"{ranks} processes cannot form groups of {expert_ranks} expert ranks; start a "
            f"multiple of {expert_ranks}"
        )
    grid = torch.arange(ranks).view(-1, expert_ranks)
    groups = [_own_group(rows, patience) for rows in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=("data", "expert"))


def _own_group(rows: Tensor, patience: timedelta | None) -> ProcessGroup:
    """That of the groups of ranks, one a row, which this rank is in; all ranks make all."""
    if len(rows) == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return dist.new_subgroups_by_enumeration(rows.tolist(), timeout=patience)[0]


def shard_experts(model: nn.Module, group: ProcessGroup) -> None:
    """Leave of each sparse layer's routed experts this rank's share, as new parameters.

    Raises UserError where the experts cannot be shared out evenly, or choose their tokens: among
    those of one rank, which is another choice than among the whole batch.
    """
    ranks = dist.get_world_size(group)
    sparse = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for layer in sparse:
        if isinstance(layer.router, ExpertChoiceRouter):
            raise UserError(
                "model.moe.routing: expert_choice chooses among the tokens of the whole batch, "
                "which no rank sees; train it without expert parallelism"
            )
        assert isinstance(layer.experts, Experts) and not isinstance(layer.experts, ShardedExperts)
        n_experts = len(layer.experts.down)
        if n_experts % ranks:
            raise UserError(
                f"model.moe.n_experts={n_experts} cannot be shared out evenly over {ranks} expert "
                "ranks; change one of them"
            )
    for layer in sparse:
        assert isinstance(layer.experts, Experts)
        layer.experts = ShardedExperts(layer.experts, group)


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ProcessGroup]]:
    """Name, own share and group of each parameter that is not the same on all ranks."""
    for path, module in model.named_modules():
        if isinstance(module, ShardedExperts):
            for name, weight in module.named_parameters():
                yield f"{path}.{name}" if path else name, weight, module.exchange.group


@torch.no_grad()
def average_expert_gradients(model: nn.Module, replicas: ProcessGroup | None = None) -> None:
    """From the sum over expert ranks to the mean over all ranks.

    `replicas` are the ranks that hold the same experts, the data ranks (None: only this one).
    """
    copies = 1 if replicas is None else dist.get_world_size(replicas)
    for _, weight, group in sharded_parameters(model):
        if weight.grad is None:
            continue
        if copies > 1:
            dist.all_reduce(weight.grad, group=replicas)
        weight.grad.div_(copies * dist.get_world_size(group))


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """The gradients of each rank's loss to those of the mean over all ranks of the mesh."""
    average_expert_gradients(model, mesh["data"].get_group())
    own = {id(weight) for _, weight, _ in sharded_parameters(model)}
    shared = [w.grad for w in model.parameters() if id(w) not in own and w.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in shared])  # few collectives, not many
    for name in ("expert", "data"):
        dist.all_reduce(flat, group=mesh[name].get_group())
    parts = flat.div_(mesh.size()).split([gradient.numel() for gradient in shared])
    for gradient, part in zip(shared, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


# --- whole tensors and shares of them ------------------------------------------------------------


def own_rows(whole: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's experts of a tensor of all experts: (E, ...) -> (E/R, ...), a view."""
    return whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]


@torch.no_grad()
def all_rows(own: Tensor, group: ProcessGroup) -> Tensor:
    """The shares of all ranks, of a weight, a gradient or a moment: (E/R, ...) -> (E, ...)."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict that the model had in one process; every rank must call, and gets it."""
    state = dict(model.state_dict())
    for name, _, group in sharded_parameters(model):
        state[name] = all_rows(state[name], group)
    return state
