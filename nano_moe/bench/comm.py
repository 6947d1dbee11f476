"""What expert parallelism sends: bytes counted in real exchanges, against the formula; and time.

Processes on this machine, one thread each, train sparse decoders with their experts shared out by
gloo. Bytes do not depend on the machine; times are of this one, where processes share cores and
memory takes the network's place. Of other links there is a lower bound, computed and not measured.

Shapes: R ranks, E experts, K top_k, D d_model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe import recipe_file
from nano_moe.accounting import sparse_layers
from nano_moe.bench.group import on_ranks
from nano_moe.bench.recipes import FOLDER, QUICK, RandomTokens
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import Spread
from nano_moe.communication import (
    LINKS,
    expert_flops,
    seconds_at_least,
    sent,
    train_flops_of_weights,
)
from nano_moe.config import ModelConfig, Recipe
from nano_moe.model.expert_parallel import (
    Exchange,
    ShardedExperts,
    average_gradients,
    parallel_mesh,
    shard_experts,
)
from nano_moe.training.module import Decoder

FINE = ("model.moe.n_experts=32", "model.moe.top_k=8")
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (  # ranks, and what changes in mixtral.yaml
    (2, ()),
    (4, ()),
    (4, ("model.moe.top_k=1",)),
    (4, ("model.moe.n_experts=16", "model.moe.top_k=4")),
    (4, FINE),
    (4, ("model.moe.n_experts=64", "model.moe.top_k=8")),
    (4, (*FINE, "model.moe.n_groups=4", "model.moe.top_k_groups=2")),
    (4, (*FINE, "model.moe.n_groups=4", "model.moe.top_k_groups=1")),
    (4, (*FINE, "trainer.precision=bf16")),
)
PUBLISHED = (  # file, ranks, groups that a token may choose from (None: the model's own)
    ("mixtral-8x7b", 8, None),
    ("deepseek-v2", 8, 8),
    ("deepseek-v2", 8, None),
    ("deepseek-v2", 8, 1),
)
BATCH = "trainer.batch_size=4"  # of each process
WARM_UP, STEPS, QUICK_STEPS = 2, 12, 2
FEW_TOKENS = 4096  # of each rank at once, for published models
NOTES = (
    "forward, backward bytes: measured, those handed to the collectives for other ranks, per token "
    "and sparse layer; weights are as drawn. formula: computed, both together, for routers that "
    "prefer no expert; over formula: measured over computed.",
    "copies: other ranks that a token goes to, computed; per expert: if it went once to each "
    "expert. FLOPs/byte: of routed experts, forward and backward, over measured bytes.",
    "exchange share: of a step's time, waiting for slower ranks included, mean and least of the "
    "ranks; averaging share: gradients of what is replicated. The processes share these cores, "
    "and cases come one after the other: compare shares rather than times.",
    "at least: computed, not measured: bytes over the bandwidth that the link's makers state, "
    "which is a lower bound and no prediction: no latency, no headers, no congestion.",
    "link-bound from: a device of that speed, or a faster one, waits for the link as long as it "
    "takes for its products with weights, or longer, unless the two overlap.",
)


class Step(NamedTuple):
    """What one rank measured in one training step."""

    seconds: float
    exchange_seconds: float
    averaging_seconds: float
    forward_bytes: int  # to other ranks
    backward_bytes: int


def comm(quick: bool) -> Report:
    rows: list[Row] = []
    steps = QUICK_STEPS if quick else STEPS
    for ranks in sorted({ranks for ranks, _ in CASES}):
        recipes = [_recipe(changes, quick) for n, changes in CASES if n == ranks]
        found = measure(recipes, ranks, steps)
        rows += [_row(recipe, of) for recipe, of in zip(recipes, found, strict=True)]
    return Report("expert parallelism", [*rows, *bounds()], NOTES)


def _recipe(changes: Sequence[str], quick: bool) -> Recipe:
    return recipe_file.load(FOLDER / "mixtral.yaml", (BATCH, *(QUICK if quick else ()), *changes))


# --- measured ------------------------------------------------------------------------------------


def measure(recipes: Sequence[Recipe], ranks: int, steps: int) -> list[list[list[Step]]]:
    """Of each recipe, of each of so many ranks, its steps."""
    found = on_ranks(ranks, _every_recipe, list(recipes), steps)
    return [[[Step(*one) for one in rank] for rank in of] for of in zip(*found, strict=True)]


def _every_recipe(recipes: Sequence[Recipe], steps: int) -> list[list[Step]]:
    return [_steps(recipe, steps) for recipe in recipes]


def _steps(recipe: Recipe, steps: int) -> list[Step]:
    """All ranks are expert ranks, each on tokens of its own."""
    parallel = ParallelStep(recipe)
    return [parallel.run(number) for number in range(WARM_UP + steps)][WARM_UP:]


class MeteredExchange(Exchange):
    """Counts what it is given for other ranks, and the seconds until all has come."""

    bytes, seconds = 0, 0.0

    def move(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        start = time.perf_counter()
        came = super().move(rows, send, receive)
        self.seconds += time.perf_counter() - start
        self.bytes += self.abroad(send) * rows[0].nbytes if len(rows) else 0
        return came


class ParallelStep:
    """Steps of a recipe in this rank, with nothing around them: no clipping, no schedule."""

    def __init__(self, recipe: Recipe):
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.mesh = parallel_mesh(self.ranks)
        self.module, self.tokens = Decoder(recipe), RandomTokens(recipe)
        self.bf16 = recipe.trainer.precision == "bf16"
        group = self.mesh["expert"].get_group()
        shard_experts(self.module.model, group)
        self.meter = MeteredExchange(group)
        for layer in self.module.modules():
            if isinstance(layer, ShardedExperts):
                layer.exchange = self.meter
        (self.optimizer,), _ = self.module.configure_optimizers()

    def run(self, number: int) -> Step:
        batch = self.tokens(number * self.ranks + self.rank)
        self.meter.bytes, self.meter.seconds = 0, 0.0
        times = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.module.training_step(batch, number)["loss"]
        forward_bytes = self.meter.bytes
        loss.backward()
        times.append(time.perf_counter())
        average_gradients(self.module.model, self.mesh)
        times.append(time.perf_counter())
        if self.module.balancing is not None:
            self.module.balancing.step(self.module.model.routers)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(
            time.perf_counter() - times[0],
            self.meter.seconds,
            times[2] - times[1],
            forward_bytes,
            self.meter.bytes - forward_bytes,
        )


def bytes_per_token(recipe: Recipe, ranks: Sequence[Sequence[Step]]) -> tuple[float, float]:
    """(forward, backward) bytes per token and sparse layer, over all ranks and steps."""
    steps = [step for rank in ranks for step in rank]
    tokens = len(steps) * recipe.tokens_per_step * sparse_layers(recipe.model)
    forward, backward = (sum(s.forward_bytes for s in steps), sum(s.backward_bytes for s in steps))
    return forward / tokens, backward / tokens


def _row(recipe: Recipe, ranks: Sequence[Sequence[Step]]) -> Row:
    model, moe = recipe.model, recipe.model.moe
    assert moe is not None
    forward, backward = bytes_per_token(recipe, ranks)
    batch = recipe.trainer.batch_size * model.context
    formula = sent(model, len(ranks), recipe.trainer.precision, batch)
    shares = [statistics.median(s.exchange_seconds / s.seconds for s in rank) for rank in ranks]
    steps = [step for rank in ranks for step in rank]
    return {
        "ranks": len(ranks),
        "experts": moe.n_experts,
        "top_k": moe.top_k,
        "granularity": model.d_ff / model.expert_width,
        "groups": _groups(model),
        "precision": recipe.trainer.precision,
        "copies": formula.copies,
        "per expert": formula.copies_per_expert,
        "forward bytes": forward,
        "backward bytes": backward,
        "formula": formula.bytes,
        "over formula": (forward + backward) / formula.bytes,
        "FLOPs/byte": expert_flops(model) / (forward + backward),
        "ms": Spread.of([step.seconds for step in steps]).scaled(1e3),
        "exchange share": statistics.fmean(shares),
        "least": min(shares),
        "averaging share": statistics.median(s.averaging_seconds / s.seconds for s in steps),
        "steps": len(ranks[0]),
    }


# --- computed ------------------------------------------------------------------------------------


def bounds() -> Iterator[Row]:
    """Published models on other links: bytes over the stated bandwidth."""
    for file, ranks, groups in PUBLISHED:
        model = _published(file, groups)
        one, layers = sent(model, ranks, "bf16", FEW_TOKENS), sparse_layers(model)
        flops = train_flops_of_weights(model)
        for link in LINKS:
            seconds = seconds_at_least(one.bytes * layers, link)
            yield {
                "model": file,
                "groups": _groups(model),
                "ranks": ranks,
                "copies": one.copies,
                "bytes/token/layer, computed": one.bytes,
                "sparse layers": layers,
                "link": link.name,
                "GB/s, stated": link.bytes_per_second / 1e9,
                "at least, µs/token": 1e6 * seconds,
                "link-bound from, TFLOP/s": flops / seconds / 1e12,
            }


def _published(file: str, groups: int | None) -> ModelConfig:
    """The model; with `groups`, choosing from so many."""
    model = recipe_file.load_any(FOLDER / "published" / f"{file}.yaml").model
    assert model is not None and model.moe is not None
    if groups is None:
        return model
    return model.model_copy(update={"moe": model.moe.model_copy(update={"top_k_groups": groups})})


def _groups(model: ModelConfig) -> str:
    moe = model.moe
    assert moe is not None
    return f"{moe.top_k_groups} of {moe.n_groups}" if moe.n_groups > 1 else ""
