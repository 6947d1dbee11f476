"""What balancing adds to training: weighted terms in the loss, and steps of the selection bias.

Shapes: B sequences, N tokens, L sparse layers, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe.config import MoEConfig
from nano_moe.model.balance import load_balancing_loss, router_z_loss, updated_expert_bias
from nano_moe.model.router import HashRouter, Router
from nano_moe.model.routing import Routing, count_tokens


class Balancing:
    """Sums token counts over the micro-batches of one optimizer step, and balances by them."""

    def __init__(self, moe: MoEConfig):
        self.moe = moe
        self.coefficients = {
            "load_balancing_loss": moe.load_balancing_loss,
            "router_z_loss": moe.router_z_loss,
        }
        self.counts: Tensor | None = None  # (L, E) of this step's micro-batches so far

    def terms(self, sparse: list[Routing], n_sequences: int) -> dict[str, Tensor]:
        """Raw terms per sparse layer, each (L,), of a micro-batch of `n_sequences`.

        At global-batch scope the shares are those of all micro-batches and ranks of the step so
        far: exact at the last one, growing towards it before (Qiu et al. 2025, sec. 3).
        """
        counts = torch.stack([routing.counts for routing in sparse])
        globally = self.moe.balance_scope == "global_batch"
        counts = summed_over_ranks(counts) if globally else counts
        self.counts = counts if self.counts is None else self.counts + counts
        balance = []
        for layer, routing in enumerate(sparse):
            counts, probs = self.counts[layer] if globally else routing.counts, routing.probs
            if self.moe.balance_scope == "sequence":
                counts = count_tokens(routing.ids.view(n_sequences, -1), len(routing.counts))
                probs = probs.unflatten(0, (n_sequences, -1))  # (B, T, E)
            balance.append(load_balancing_loss(counts=counts, probs=probs))
        z_losses = [router_z_loss(logits=routing.logits) for routing in sparse]
        return {
            "load_balancing_loss": torch.stack(balance),
            "router_z_loss": torch.stack(z_losses),
        }

    def weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Coefficient times term, each summed over layers: equal strength at any depth."""
        used = {name: term for name, term in terms.items() if self.coefficients[name]}
        return {name: self.coefficients[name] * term.sum() for name, term in used.items()}

    @torch.no_grad()
    def step(self, routers: Iterable[Router | HashRouter]) -> None:
        """Once per optimizer step: move the selection biases, forget the counts."""
        counts, self.counts = self.counts, None
        if counts is None or self.moe.bias_update_rate == 0:
            return
        if self.moe.balance_scope != "global_batch":  # else they are of all ranks already
            counts = summed_over_ranks(counts)
        for router, load in zip(routers, counts, strict=True):
            assert router.expert_bias is not None
            bias = updated_expert_bias(
                bias=router.expert_bias,
                counts=load,
                rate=self.moe.bias_update_rate,
                rule=self.moe.bias_rule,
            )
            router.expert_bias.copy_(bias)


def summed_over_ranks(counts: Tensor) -> Tensor:
    """Counts of all processes where there are several, else as given."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts
