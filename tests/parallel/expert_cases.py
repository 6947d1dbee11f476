"""What four processes do for test_expert_parallel.py: each case once, its figures handed back.

Every process has the whole model and batch, too, and compares its share with them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh

from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.errors import UserError
from nano_moe.model import expert_parallel as ep
from nano_moe.model.balance import router_z_loss
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy
from nano_moe.model.moe import MoE

RANKS, SEQUENCES, CONTEXT = 4, 8, 6
SIZES: dict[str, Any] = {
    "vocab_size": 50, "context": CONTEXT, "n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 32,
    "init_std": 0.3,
}  # fmt: skip
BIASED = {"score": "sigmoid", "bias_update_rate": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"backend": "fused"},
    "auto": {"backend": "auto"},
    "top-1": {"top_k": 1},
    "all experts": {"top_k": 8},
    "shared experts": {"n_shared_experts": 2, "shared_expert_gate": True},
    "groups": {"n_groups": 4, "top_k_groups": 2, "top_k": 3},
    "bias and scale": {**BIASED, "per_expert_scale": True, "routed_scaling_factor": 2.5},
    "hash": {"routing": "hash"},
    "capacity": {"capacity_factor": 0.5, "top_k": 3},
    "window, one dense": {"router_window": 2, "first_k_dense": 1},
    "frozen router": {"train_router": False},
}
GRADED = {"checkpointed": {}, "three on rank 0": {}, "crowded": BIASED}


def config_of(**moe: Any) -> ModelConfig:
    fields = {"n_experts": 8, "top_k": 2, "d_expert": 8, "backend": "loop", **moe}
    return ModelConfig(**SIZES, moe=MoEConfig(**fields))


def whole_model(dtype: torch.dtype = torch.float64, **moe: Any) -> GPT:
    model = init_weights(GPT(config_of(**moe)), 0).to(dtype)
    for router in model.routers:
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    return model


def crowd(model: GPT) -> None:
    """Send every token to experts 2 and 3."""
    for router in model.routers:
        router.expert_bias.copy_(torch.tensor([0.0, 0, 9, 9, 0, 0, 0, 0]))


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50, (SEQUENCES, CONTEXT + 1), generator=generator)


def loss_of(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and a mean over tokens."""
    logits, routings = model(tokens[:, :-1])
    z_losses = [router_z_loss(logits=r.logits) for r in routings if r is not None]
    hashed = model.config.moe.routing == "hash"
    loss = cross_entropy(logits, tokens[:, 1:]).to(logits.dtype)
    return logits, loss if hashed else loss + sum(z_losses)


def deviation(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    for name, weight, group in ep.sharded_parameters(model):
        found[name] = ep.all_rows(weight.grad, group)
    return found


def compared(mesh: DeviceMesh, model: GPT, own: GPT, shares: list[int]) -> dict[str, float]:
    """The same loss in one process and in all, whose shares of the batch these are."""
    tokens, rank = batch(), dist.get_rank()
    parts = tokens.split(shares)
    logits, loss = loss_of(model, tokens)
    loss.backward()
    ep.shard_experts(own, mesh["expert"].get_group())
    own_logits, own_loss = loss_of(own, parts[rank])
    (own_loss * shares[rank] * RANKS / SEQUENCES).backward()  # their mean is that of the batch
    ep.average_gradients(own, mesh)
    expected, found = {n: w.grad for n, w in model.named_parameters()}, whole_gradients(own)
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert expected.keys() == found.keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return {
        "forward": deviation(own_logits, logits.split(shares)[rank]),
        "gradients": max(deviation(found[name], expected[name]) for name in expected),
    }


def model_case(mesh: DeviceMesh, name: str) -> dict[str, float]:
    models = [whole_model(**MODELS[name]) for _ in range(2)]
    return compared(mesh, *models, [2, 2, 2, 2])


def graded_case(mesh: DeviceMesh, name: str) -> dict[str, float]:
    models = [whole_model(**GRADED[name]) for _ in range(2)]
    for model in models:
        model.activation_checkpointing = name == "checkpointed"
        if name == "crowded":
            crowd(model)
    return compared(mesh, *models, [5, 1, 1, 1] if name == "three on rank 0" else [2, 2, 2, 2])


def narrow_case(mesh: DeviceMesh, backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Of one layer in a dtype that float64's tolerance does not fit; relative to the largest."""
    found = {}
    layers = [first_layer(whole_model(dtype, backend=backend)) for _ in range(2)]
    hidden, rank = inputs(dtype), dist.get_rank()
    y = layers[0](hidden)[0]
    y.square().sum().backward()
    ep.shard_experts(layers[1], mesh["expert"].get_group())
    own = layers[1](hidden[2 * rank : 2 * rank + 2])[0]
    own.square().sum().backward()
    ep.average_gradients(layers[1], mesh)
    found["forward"] = deviation(own, y[2 * rank : 2 * rank + 2]) / y.abs().max().item()
    gradients = whole_gradients(layers[1])
    for name, weight in layers[0].named_parameters():
        difference = deviation(RANKS * gradients[name], weight.grad)
        found[name] = difference / weight.grad.abs().max().item()
    return {name: float(value) for name, value in found.items()}


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(SEQUENCES, CONTEXT, 16, generator=generator, dtype=torch.float64).to(dtype)


def first_layer(model: GPT) -> MoE:
    layer = model.blocks[0].ffn
    assert isinstance(layer, MoE)
    return layer


class Metered(ep.Exchange):
    """Counts what is handed to the collective for other ranks."""

    sent = 0

    def move(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        row = rows[:1].nbytes if len(rows) else 0
        self.sent += row * (sum(send) - send[self.rank])
        return super().move(rows, send, receive)


def traffic_case(mesh: DeviceMesh, autocast: bool, **moe: Any) -> dict[str, Any]:
    """The bytes that a layer reports, that its collectives were given, and the rows by hand."""
    layer = first_layer(whole_model(torch.float32, **moe))
    ep.shard_experts(layer, mesh["expert"].get_group())
    experts, rank = layer.experts, dist.get_rank()
    assert isinstance(experts, ep.ShardedExperts)
    experts.exchange = meter = Metered(mesh["expert"].get_group())
    x = inputs(torch.float32)[2 * rank : 2 * rank + 2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = layer.router(x, batch()[2 * rank : 2 * rank + 2, :-1])
        y, traffic = experts.exchanged(x.view(-1, 16), routing)
    forward, meter.sent = meter.sent, 0
    y.sum().backward()
    home = mesh["expert"].get_local_rank()
    per_rank = 8 // meter.size
    needs = [{expert // per_rank for expert in row} - {home} for row in routing.ids.tolist()]
    return {
        "reported": [traffic.forward_bytes, traffic.backward_bytes],
        "metered": [forward, meter.sent],
        "rows": [traffic.rows_out, sum(map(len, needs))],
        "rows_in": traffic.rows_in,
    }


def empty_case(mesh: DeviceMesh) -> dict[str, Any]:
    """Rank 1 has no tokens, and all others' go to its experts."""
    layer = first_layer(whole_model(**BIASED))
    layer.router.expert_bias.copy_(torch.tensor([0.0, 0, 9, 9, 0, 0, 0, 0]))
    ep.shard_experts(layer, mesh["expert"].get_group())
    rank = dist.get_rank()
    x = inputs()[: 0 if rank == 1 else 1].requires_grad_()
    y = layer(x)[0]
    y.sum().backward()
    (gradient,) = [w.grad for n, w in layer.named_parameters() if n.endswith("down")]
    return {
        "shape": list(y.shape),
        "gradient": gradient.abs().max().item(),
        "x": list(x.grad.shape),
    }


def state_case(mesh: DeviceMesh) -> dict[str, Any]:
    """A state dict through all layouts."""
    model, own, other = whole_model(), whole_model(), init_weights(GPT(config_of()), 1).double()
    for sharded in (own, other):
        ep.shard_experts(sharded, mesh["expert"].get_group())
    held = sum(weight.numel() for weight in own.parameters())
    other.load_state_dict(ep.full_state_dict(own))
    expected, found = model.state_dict(), ep.full_state_dict(other)
    other.load_state_dict(other.state_dict())  # its own shares, too
    return {
        "same": list(expected) == list(found)
        and all(torch.equal(expected[name], found[name]) for name in expected),
        "again": all(torch.equal(found[n], w) for n, w in ep.full_state_dict(other).items()),
        "held": held,
        "whole": sum(weight.numel() for weight in model.parameters()),
        "experts": sum(w.numel() for n, w in model.named_parameters() if ".experts." in n),
    }


def refusal_case(mesh: DeviceMesh) -> dict[str, str]:
    found = {}
    for name, moe in {
        "expert_choice": {"routing": "expert_choice"},
        "six": {"n_experts": 6},
    }.items():
        model = GPT(config_of(**moe))
        try:
            ep.shard_experts(model, dist.group.WORLD)
        except UserError as error:
            found[name] = str(error)
        assert not list(ep.sharded_parameters(model))
    try:
        ep.parallel_mesh(3)
    except UserError as error:
        found["mesh"] = str(error)
    return found


def patience_case() -> list[float]:
    """Seconds that each group of a mesh waits for a rank, where the job itself waits 5 minutes."""
    found = []
    for ranks in (4, 2):
        mesh = ep.parallel_mesh(ranks, patience=timedelta(seconds=77))
        groups = [mesh[name].get_group() for name in ("data", "expert")]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        found += [backend.options._timeout.total_seconds() for backend in backends]
    return found


def every_case() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ranks in (4, 2):
        mesh = ep.parallel_mesh(ranks)
        found |= {f"{name} on {ranks}": model_case(mesh, name) for name in MODELS}
        found |= {f"{name} on {ranks}": graded_case(mesh, name) for name in GRADED}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for backend in ("loop", "grouped", "fused"):
                case = narrow_case(mesh, backend, dtype)
                found[f"{backend} in {name} on {ranks}"] = case
        for autocast in (False, True):
            for kind, moe in {"choice": {}, "hash": {"routing": "hash"}}.items():
                name = f"traffic of {kind}{', autocast' if autocast else ''} on {ranks}"
                found[name] = traffic_case(mesh, autocast, **moe)
        found[f"state on {ranks}"] = state_case(mesh)
    found["empty"] = empty_case(ep.parallel_mesh(4))
    found["refused"] = refusal_case(mesh)
    found["patience"] = patience_case()
    return found
