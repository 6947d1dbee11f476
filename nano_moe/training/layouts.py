"""Where weights and their optimizer's state lie: on every process whole, or shared out.

    ddp    whole on every process
    fsdp   every parameter by rows (its first dimension): FSDP2, torch.distributed.fsdp
    ep     routed experts by expert, all else whole: model/expert_parallel.py

A checkpoint knows none of them: it is gathered to what one process would write, and each process
takes its part when it is read.

Shapes: S matrices of m rows and n columns; a share has some of the first dimension's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nano_moe import ranks
from nano_moe.config import Recipe
from nano_moe.model import kernels
from nano_moe.model.expert_parallel import (
    all_rows,
    average_expert_gradients,
    own_rows,
    parallel_mesh,
    shard_experts,
    sharded_parameters,
)
from nano_moe.model.gpt import GPT
from nano_moe.training import processes

# --- one tensor ----------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    """What of a tensor lies here: its memory, not a copy."""
    return x.to_local() if isinstance(x, DTensor) else x


def by_rows_of_matrices(parameter: Tensor) -> bool:
    """Whether a matrix lies here in part; stacked experts lie as whole matrices or elsewhere."""
    return isinstance(parameter, DTensor) and parameter.ndim == 2


def gathered(part: Tensor, like: DTensor) -> Tensor:
    """The full tensor of parts that lie as those of `like` do; collective."""
    held = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return held.full_tensor()


def part_of(full: Tensor, like: DTensor) -> DTensor:
    """Of a full tensor what lies here where it is shared out as `like` is; nothing is sent."""
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


# --- a model -------------------------------------------------------------------------------------


def shared_by(model: nn.Module) -> dict[int, ProcessGroup]:
    """The processes among which a parameter is shared out, by the parameter's id."""
    experts = {id(weight): group for _, weight, group in sharded_parameters(model)}
    rows = {
        id(weight): weight.device_mesh.get_group()
        for weight in model.parameters()
        if isinstance(weight, DTensor)
    }
    return experts | rows


def full(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A parameter, or what its optimizer keeps for it, as one process has it; collective."""
    if isinstance(x, DTensor):
        return x.full_tensor()
    return x if group is None or x.ndim == 0 else all_rows(x, group)


def part(x: Tensor, parameter: Tensor, group: ProcessGroup | None) -> Tensor:
    """Of what `full` gives, what lies here."""
    if group is None or x.ndim == 0:
        return x
    return part_of(x, parameter) if isinstance(parameter, DTensor) else own_rows(x, group)


# --- strategies ----------------------------------------------------------------------------------


def strategy_of(recipe: Recipe) -> Strategy | str:
    """The trainer's strategy for a recipe."""
    trainer = recipe.trainer
    if not trainer.is_parallel:
        return "auto"
    if trainer.strategy == "fsdp":
        return FullyShardedStrategy()
    if trainer.strategy == "ep":
        return ExpertStrategy(trainer.expert_ranks or ranks.count())
    return ReplicatedStrategy()


class ReplicatedStrategy(DDPStrategy):
    """DDP (Li et al. 2020) that adds up in one order from the first step on, resumed or not.

    After the first backward that it sees, DDP sorts gradients anew into the buckets that it sends,
    and where in a bucket a number lies decides in which order more than two processes' parts of it
    are added. So it sees one before training, of the sum of all weights, which reaches them in
    the reverse of their order as the loss does.
    """

    def __init__(self) -> None:
        # Buffers need not be sent: every process computes the same ones.
        super().__init__(forward_sync_buffers=False, gradient_as_bucket_view=True)

    def configure_ddp(self) -> None:
        super().configure_ddp()
        module = self.lightning_module
        assert module is not None and self.model is not None
        with torch.enable_grad(), _sum_for_forward(module):
            self.model().backward()
        module.zero_grad()


@contextlib.contextmanager
def _sum_for_forward(module: nn.Module) -> Iterator[None]:
    weights = list(module.parameters())
    module.forward = lambda: torch.stack([weight.sum() for weight in weights]).sum()
    try:
        yield
    finally:
        del module.forward  # the instance's, which hid the class's


class Gathered(Strategy):
    """A strategy that shares weights out, and whose checkpoints are those of one process."""

    def share_out(self, model: GPT) -> None:
        """Leave here what this process holds; before the optimizer is made."""
        raise NotImplementedError

    def finish_gradients(self, model: GPT) -> None:
        """What the engine leaves to do to make them those of the mean loss of all processes."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self._module()
        named = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
        first = {number: name for name, number in reversed(named.items())}
        # Tied weights have two names; gathered once, they are written once, as one process does.
        same = {name: first[number] for name, number in named.items()}
        groups, state = shared_by(module), module.state_dict()
        once = {name: x for name, x in state.items() if same.get(name, name) == name}
        kept = self._kept(once, {name: groups.get(named.get(name, 0)) for name in once})
        return {name: kept[same.get(name, name)] for name in state} if self.is_global_zero else {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state, groups = optimizer.state_dict(), shared_by(self._module())
        held = {}
        for number, parameter in enumerate(_parameters(optimizer)):
            if number in state["state"]:
                tensors = state["state"][number]
                group = groups.get(id(parameter))
                held[number] = self._kept(tensors, dict.fromkeys(tensors, group))
        return {**state, "state": held}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self._module()
        named = dict(module.named_parameters(remove_duplicate=False))
        state = dict(checkpoint["state_dict"])
        for name, parameter in named.items():
            if isinstance(parameter, DTensor) and name in state:
                state[name] = part_of(state[name], parameter)
        module.load_state_dict(state, strict=strict)  # sharded experts take their own part

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        groups = shared_by(self._module())
        parts = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters, held = _parameters(optimizer), {}
            for number, tensors in state["state"].items():
                parameter = parameters[number]
                group = groups.get(id(parameter))
                held[number] = {k: part(x, parameter, group) for k, x in tensors.items()}
            parts.append({**state, "state": held})
        # Not super(): of an engine with files of its own that does nothing.
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": parts})

    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _kept(
        self, tensors: Mapping[str, Tensor], groups: Mapping[str, ProcessGroup | None]
    ) -> dict[str, Tensor]:
        """Gathered one by one; every process takes part, and one keeps them."""
        kept = {}
        for name, tensor in tensors.items():
            whole = full(tensor, groups[name])
            if self.is_global_zero:
                kept[name] = whole.cpu() if groups[name] is not None else whole
        return kept


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class FullyShardedStrategy(Gathered, ModelParallelStrategy):
    """FSDP2: a block's weights are gathered for its passes alone (Zhao et al. 2023)."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=ranks.count(), tensor_parallel_size=1)

    def share_out(self, model: GPT) -> None:
        # Blocks by themselves, and what is left with the whole.
        kernels.leave_resizable()
        mesh = self.device_mesh["data_parallel"]
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
            assert isinstance(module, FSDPModule)
            module.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")  # gloo has no mean

    # Its own are for folders of shards; the plain ones write and read one file.
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    lightning_restore_optimizer = True


class ExpertStrategy(Gathered, ReplicatedStrategy):
    """DDP for all that is replicated; experts get their gradients where they lie."""

    def __init__(self, expert_ranks: int):
        super().__init__()
        self.expert_ranks = expert_ranks
        self._mesh: DeviceMesh | None = None

    def share_out(self, model: GPT) -> None:
        # Else those that share experts would wait longer for a silent process than all others do.
        patience = processes.SILENCE
        self._mesh = parallel_mesh(self.expert_ranks, self.root_device.type, patience)
        shard_experts(model, self._mesh["expert"].get_group())
        experts = [f"model.{name}" for name, _, _ in sharded_parameters(model)]
        module = self.lightning_module
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module, experts
        )

    def finish_gradients(self, model: GPT) -> None:
        assert self._mesh is not None
        average_expert_gradients(model, self._mesh["data"].get_group())
