"""The Lightning module: one training step, its losses, balancing and gradient norms.

Shapes: B batch, T time, L sparse layers, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nano_moe import ranks
from nano_moe.accounting import count
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.model.balance import router_entropy
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy
from nano_moe.model.routing import dropped_share
from nano_moe.runs import SCHEMA
from nano_moe.training.balancing import Balancing
from nano_moe.training.layouts import Gathered, local, shared_by
from nano_moe.training.optimizers import MuonAdamW, parameter_groups
from nano_moe.training.schedule import multiplier


class NonFiniteTraining(UserError):
    """Loss or gradients are not finite; raised before the optimizer step that would keep them."""


class Decoder(L.LightningModule):
    """GPT plus what training adds: losses, balancing, optimizer."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.model = init_weights(GPT(recipe.model), recipe.seed)
        self.model.activation_checkpointing = recipe.trainer.activation_checkpointing
        self.layers = [i for i in range(recipe.model.n_layers) if recipe.model.is_sparse(i)]
        self.train_flops_per_token = count(recipe).train_flops_per_token
        self.gradient_norms: dict[str, Tensor] = {}
        self.learning_rates: dict[str, float] = {}  # of the step being taken, by group
        self.layout: Gathered | None = None  # None: all weights are on every process
        self._step_loss: Tensor | float = 0.0  # summed over micro-batches
        moe = recipe.model.moe
        self.balancing = None if moe is None else Balancing(moe)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Gathered):
            self.layout = self.trainer.strategy
            self.layout.share_out(self.model)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:  # (B, T + 1)
        """The loss of this process's sequences; all else is of the whole micro-batch."""
        logits, routings = self.model(batch[:, :-1])
        ce = cross_entropy(logits, batch[:, 1:])
        output, loss = {"ce": ce.detach()}, ce
        counts: dict[str, Tensor] = {}
        if self.balancing is not None:
            sparse = [routing for routing in routings if routing is not None]
            terms = self.balancing.terms(sparse, len(batch))
            weighted = self.balancing.weighted(terms)
            loss = ce + sum(weighted.values(), start=torch.zeros_like(ce))
            output |= {name: term.detach() for name, term in terms.items()}
            output |= {f"weighted_{name}": term.detach() for name, term in weighted.items()}
            entropies = [router_entropy(routing.probs.detach()) for routing in sparse]
            output["router_entropy"] = torch.stack(entropies)  # (L,)
            assert self.balancing.latest is not None
            counts["counts"] = self.balancing.latest  # (L, E)
            if self.balancing.moe.capacity_factor is not None:
                output["dropped_share"] = torch.stack([dropped_share(r) for r in sparse])
        output = ranks.mean({"total_loss": loss.detach(), **output})
        self._step_loss = self._step_loss + output["total_loss"]
        # The trainer divides "loss" by the accumulation; "total_loss" stays what it is.
        return {"loss": loss, **output, **counts}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.layout is not None:
            self.layout.finish_gradients(self.model)
        self.gradient_norms = gradient_norms(self.model)
        self.learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        norm, loss = self.gradient_norms["total"].item(), float(self._step_loss)
        self._step_loss = 0.0
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise NonFiniteTraining(
                f"step {self.global_step + 1}: loss is {loss:g} and the gradient norm {norm:g}"
            )
        if self.balancing is not None:
            self.balancing.step(self.model.routers)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step, and free the gradients at once: the next forward pass needs their room."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale all gradients to the recipe's largest norm, by the norm already computed."""
        limit = self.recipe.optim.grad_clip
        if limit <= 0:
            return
        scale = limit / (self.gradient_norms["total"].item() + 1e-6)
        if scale < 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(scale)

    def configure_optimizers(self) -> Any:
        config, steps = self.recipe.optim, self.recipe.trainer.steps
        optimizer = MuonAdamW(parameter_groups(self.model, config), config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: multiplier(min(step, steps - 1), steps, config)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        others = ranks.gathered(rng)[1:]
        checkpoint["nano_moe"] = {
            "schema": SCHEMA,
            "recipe": self.recipe.model_dump(mode="json"),
            "rng": rng,
            **({"rng_of_others": others} if others else {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint["nano_moe"]
        states = [ours["rng"], *ours.get("rng_of_others", [])]
        if ranks.rank() >= len(states):  # there were fewer: noise of its own from here on
            torch.manual_seed(self.recipe.seed + ranks.rank() + checkpoint["global_step"])
            return
        rng = states[ranks.rank()]
        torch.set_rng_state(rng["cpu"].cpu())
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"].cpu())


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Norm of all gradients, and of routers' and experts' alone where there are any.

    Squares of what is shared out are summed over those that share it; collective.
    """
    squares: dict[str, list[Tensor]] = {"total": [], "router": [], "experts": []}
    shares: dict[str, list[Tensor]] = {part: [] for part in squares}
    groups = shared_by(model)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = local(parameter.grad)
        square = torch.linalg.vector_norm(grad, dtype=norm_dtype(grad)).square()
        held = shares if id(parameter) in groups else squares
        held["total"].append(square)
        for part in ("router", "experts"):
            if f".{part}." in name:
                held[part].append(square)
    if groups:
        _add_shares(squares, shares, next(iter(groups.values())))
    return {part: torch.stack(values).sum().sqrt() for part, values in squares.items() if values}


def _add_shares(
    squares: dict[str, list[Tensor]], shares: dict[str, list[Tensor]], group: ProcessGroup
) -> None:
    """One group shares out whatever is shared out."""
    parts = [part for part, values in shares.items() if values]
    sums = ranks.total(torch.stack([torch.stack(shares[part]).sum() for part in parts]), group)
    for part, value in zip(parts, sums, strict=True):
        squares[part].append(value)


def norm_dtype(grad: Tensor) -> torch.dtype:
    """Squares are summed in float32, or wider where the numbers are."""
    return torch.promote_types(grad.dtype, torch.float32)
