"""`model.moe`: what makes FFN layers sparse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nano_moe.config.section import FieldFault, Section


class MoEConfig(Section):
    """The block that makes FFN layers sparse; its absence makes a dense model."""

    n_experts: int = Field(ge=1, le=2**16, description="routed experts per sparse layer (E)")
    top_k: int = Field(
        ge=1,
        le=2**16,
        description="routed experts each token visits (K); on average, where experts choose",
    )
    d_expert: int | None = Field(
        default=None,
        gt=0,
        le=2**24,
        description="hidden width of one expert; omitted: d_ff / (top_k + n_shared_experts)",
    )
    n_shared_experts: int = Field(
        default=0, ge=0, le=2**12, description="experts that every token visits, each d_expert wide"
    )
    shared_expert_gate: bool = Field(
        default=False, description="weigh the shared experts by a learned sigmoid per token"
    )
    first_k_dense: int = Field(default=0, ge=0, description="leading layers that stay dense")
    every_n_layers: int = Field(
        default=1, ge=1, description="layer i is sparse when (i + 1) divides by this"
    )
    routing: Literal["token_choice", "expert_choice", "hash"] = Field(
        default="token_choice",
        description="who chooses: each token its experts, each expert its tokens (sees the future: "
        "a demo, never evaluated), or a fixed hash of the token's id",
    )
    score: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="how router logits become scores"
    )
    normalize_top_k: Literal[True, False, "even_top_1"] | None = Field(
        default=None,
        description="divide the chosen scores by their sum; omitted: true for top_k > 1; "
        "even_top_1: for one, too, which leaves the router without gradient: a demo of that fault",
    )
    routed_scaling_factor: float = Field(
        default=1.0, gt=0, description="multiplies every weight, after normalization"
    )
    per_expert_scale: bool = Field(
        default=False, description="a learned factor per expert on its weights, from 1"
    )
    n_groups: int = Field(
        default=1, ge=1, le=2**16, description="equal groups that the experts form; 1: no groups"
    )
    top_k_groups: int = Field(
        default=1, ge=1, le=2**16, description="groups that a token may choose experts from"
    )
    group_score: Literal["max", "top2_sum"] = Field(
        default="max", description="a group's score: its best expert's, or its best two's sum"
    )
    router_window: int = Field(
        default=1, ge=1, le=2**16, description="last positions that router logits see; 1: the token"
    )
    train_router: bool = Field(
        default=True, description="false: router weights stay as drawn, a baseline"
    )
    noisy_top_k: bool = Field(
        default=False, description="learned Gaussian noise on router logits, in training only"
    )
    router_jitter: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="the router's input times U(1 - this, 1 + this), in training only",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        le=2**16,
        description="an expert takes at most this x top_k x T / n_experts tokens of a sequence, "
        "in training only; omitted: nothing is dropped",
    )
    load_balancing_loss: float = Field(
        default=0.0, ge=0, description="coefficient of the Switch load-balancing loss; 0: none"
    )
    balance_scope: Literal["micro_batch", "sequence", "global_batch"] = Field(
        default="micro_batch", description="tokens over which the load-balancing loss wants balance"
    )
    router_z_loss: float = Field(
        default=0.0, ge=0, description="coefficient of the ST-MoE router z-loss; 0: none"
    )
    bias_update_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="step of the aux-free selection bias per optimizer step; 0: no bias",
    )
    bias_rule: Literal["sign", "error"] = Field(
        default="sign", description="the bias moves by the load error's sign, or by the error"
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="dense run whose weights the model starts from, its FFN in every expert",
    )
    backend: Literal["auto", "loop", "grouped", "fused"] = Field(
        default="auto", description="how tokens reach their experts; equal results"
    )

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        self._check_choice()
        self._check_groups()
        if self.shared_expert_gate and not self.n_shared_experts:
            raise FieldFault(
                "shared_expert_gate", "there is nothing to gate; set n_shared_experts, or drop it"
            )
        if self.bias_rule != "sign" and self.bias_update_rate == 0:
            raise FieldFault(
                "bias_rule", "there is no bias to move; set bias_update_rate, or drop it"
            )
        if self.bias_update_rate > 0 and self.score == "softmax" and self.bias_rule == "sign":
            raise FieldFault(
                "bias_update_rate",
                "the sign rule needs scores of one scale; set score to sigmoid or bias_rule to "
                "error, or balance with load_balancing_loss",
            )
        if self.noisy_top_k and not self.train_router:
            raise FieldFault("noisy_top_k", "its spread is learned; drop it, or train the router")
        self._check_fits_routing()
        if self.init_from is not None:
            self._check_upcycling()
        return self

    def _check_choice(self) -> None:
        if self.top_k > self.n_experts:
            raise FieldFault(
                "top_k",
                f"top_k={self.top_k} is more than n_experts={self.n_experts}; "
                f"set top_k to at most {self.n_experts}",
            )
        if self.normalize_top_k is True and self.top_k == 1 and self.n_experts > 1:
            raise FieldFault(
                "normalize_top_k",
                "true with top_k=1 makes every gate exactly 1, so the router gets no gradient; "
                "set normalize_top_k to false",
            )
        if self.normalize_top_k == "even_top_1" and self.top_k > 1:
            raise FieldFault(
                "normalize_top_k", f"even_top_1 is of top_k=1, not {self.top_k}; set it to true"
            )

    def _check_groups(self) -> None:
        if self.n_experts % self.n_groups:
            raise FieldFault(
                "n_groups",
                f"n_groups={self.n_groups} does not divide n_experts={self.n_experts}; "
                "change one of them",
            )
        if self.top_k_groups > self.n_groups:
            raise FieldFault(
                "top_k_groups",
                f"top_k_groups={self.top_k_groups} is more than n_groups={self.n_groups}; lower it",
            )
        size = self.n_experts // self.n_groups
        if self.top_k > self.top_k_groups * size:
            raise FieldFault(
                "top_k_groups",
                f"{self.top_k_groups} groups of {size} experts are fewer than top_k={self.top_k}; "
                "raise it",
            )
        if self.group_score != "max" and self.n_groups == 1:
            raise FieldFault(
                "group_score", "there are no groups to score; set n_groups, or drop it"
            )
        if self.group_score == "top2_sum" and size < 2:
            raise FieldFault(
                "group_score", f"top2_sum needs two experts in a group, not {size}; set it to max"
            )

    def _check_fits_routing(self) -> None:
        """Fields that would silently do nothing under the chosen routing are refused."""
        learned = {
            "n_groups": self.n_groups > 1,
            "bias_update_rate": self.bias_update_rate > 0,
            "load_balancing_loss": self.load_balancing_loss > 0,
            "balance_scope": self.balance_scope != "micro_batch",
            "normalize_top_k": self.normalize_top_k is not None,
        }
        unused = {
            "token_choice": {},
            "expert_choice": learned | {"capacity_factor": self.capacity_factor is not None},
            "hash": learned
            | {
                "score": self.score != "softmax",
                "router_window": self.router_window > 1,
                "train_router": not self.train_router,
                "noisy_top_k": self.noisy_top_k,
                "router_jitter": self.router_jitter > 0,
                "router_z_loss": self.router_z_loss > 0,
            },
        }[self.routing]
        fields = [field for field, given in unused.items() if given]
        if fields:
            others = f", nor has {', '.join(fields[1:])}" if fields[1:] else ""
            raise FieldFault(
                fields[0],
                f"has no effect with routing={self.routing}{others}; remove it, or set it back to "
                "its default (a loss: 0)",
            )

    def _check_upcycling(self) -> None:
        drops = self.routing == "expert_choice" or self.capacity_factor is not None
        if drops or not self.weights_sum_to_one:
            raise FieldFault(
                "init_from",
                "goes on from the dense loss only where a token's weights sum to 1; set top_k to "
                "2 or more, normalized, with routed_scaling_factor 1, no capacity_factor and no "
                "expert_choice",
            )
        if self.n_shared_experts:
            raise FieldFault(
                "init_from", "shared experts would add to the dense output; set them to 0"
            )

    @property
    def normalizes(self) -> bool:
        """Whether the chosen scores are divided by their sum (for top-1 as a demo: trap T1)."""
        return self.top_k > 1 if self.normalize_top_k is None else bool(self.normalize_top_k)

    @property
    def weights_sum_to_one(self) -> bool:
        alone = self.n_experts == 1 and self.score == "softmax"
        sums = alone or self.normalizes or self.routing == "hash"
        return sums and self.routed_scaling_factor == 1

    @property
    def n_active(self) -> int:
        """Experts a token visits, shared ones included."""
        return self.top_k + self.n_shared_experts

    def is_sparse(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds experts."""
        return layer >= self.first_k_dense and (layer + 1) % self.every_n_layers == 0
