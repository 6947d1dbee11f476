"""What balancing adds to training: weighted terms in the loss, and steps of the selection bias.

Shapes: B sequences, N tokens, L sparse layers, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nano_moe import ranks
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
        self.latest: Tensor | None = None  # (L, E) of the last micro-batch, of all ranks
        self.counts: Tensor | None = None  # (L, E) of this step's micro-batches so far

    def terms(self, sparse: list[Routing], n_sequences: int) -> dict[str, Tensor]:
        """Raw terms per sparse layer, each (L,), of a micro-batch, `n_sequences` of it here.

        Shares are those of the whole micro-batch, of all ranks: the mean over ranks of a term, and
        of its gradient, is then that of one process. At global-batch scope they are those of all
        micro-batches of the step so far: exact at the last one, growing towards it before (Qiu et
        al. 2025).
        """
        self.latest = ranks.total(torch.stack([routing.counts for routing in sparse]))
        self.counts = self.latest if self.counts is None else self.counts + self.latest
        seen = self.counts if self.moe.balance_scope == "global_batch" else self.latest
        balance = []
        for layer, routing in enumerate(sparse):
            counts, probs = seen[layer], routing.probs
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
        for router, load in zip(routers, counts, strict=True):
            assert router.expert_bias is not None
            bias = updated_expert_bias(
                bias=router.expert_bias,
                counts=load,
                rate=self.moe.bias_update_rate,
                rule=self.moe.bias_rule,
            )
            router.expert_bias.copy_(bias)
