"""Published models: written down to be counted, never trained here.

A file holds either a `model:` block, where our decoder can be that model, or `weights:`, a list of
its weights, where it cannot (an encoder-decoder, learned positions, biases, other norms). Plain
like `config/`: nothing here builds anything, `census.py` does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nano_moe.accounting import WeightGroup
from nano_moe.config import FieldFault, ModelConfig, Section

Kind = Literal[
    "embedding", "attention", "norm", "ffn", "router", "experts", "shared_experts", "head", "bias"
]
Size = Annotated[int, Field(ge=1, le=2**40)]
NEVER_MULTIPLIED = ("embedding", "norm", "bias")


class Publication(Section):
    """Who published the model, and what they say of its size."""

    name: str = Field(min_length=1, description="as its authors call it")
    source: str = Field(min_length=1, description="paper or repository that the figures are from")
    total: float | None = Field(
        default=None, gt=0, description="parameters in billions, as the authors round them"
    )
    active: float | None = Field(
        default=None, gt=0, description="of those, per token; omitted: none is given, or all"
    )
    rumour: bool = Field(default=False, description="true: nobody who built it has confirmed it")
    note: str | None = Field(default=None, min_length=1, description="what the figures leave out")


class WeightListing(Section):
    """Weights of one shape and role, over the whole model."""

    name: str = Field(min_length=1, description="what it is called in the source")
    kind: Kind = Field(description="what it counts as")
    shape: tuple[Size, ...] = Field(min_length=1, max_length=4, description="of one copy")
    copies: int = Field(
        ge=0, le=2**40, description="stored; 0: another entry's, used again (a tied head)"
    )
    active: int = Field(ge=0, description="of those, touched by one token")
    products: int | None = Field(
        default=None,
        ge=0,
        le=2**40,
        description="matrix products with it per token; omitted: active, or 0 for embeddings, "
        "norms and biases",
    )
    source: str = Field(min_length=1, description="where its shape and number are from")

    @field_validator("shape", mode="before")
    @classmethod
    def _a_list_will_do(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> WeightListing:
        if self.active > self.copies:
            raise FieldFault(
                "active", f"{self.active} is more than copies={self.copies}; lower it to that"
            )
        return self

    def group(self) -> WeightGroup:
        products = 0 if self.kind in NEVER_MULTIPLIED else self.active
        if self.products is not None:
            products = self.products
        return WeightGroup(self.kind, self.name, self.shape, self.copies, self.active, products)


class Published(Section):
    """A model to count. Without a `published:` block it is one that someone tries out."""

    published: Publication | None = Field(default=None, description="where the figures are from")
    model: ModelConfig | None = Field(default=None, description="the model, as our decoder")
    weights: tuple[WeightListing, ...] | None = Field(
        default=None, min_length=1, description="its weights, where it is not our decoder"
    )
    n_experts: int | None = Field(
        default=None, ge=2, description="routed experts per sparse layer; with weights only"
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _a_list_will_do(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Published:
        if self.model is None and self.weights is None:
            raise FieldFault("model", "missing; give this block, or a list of weights")
        if self.model is not None and self.weights is not None:
            raise FieldFault("weights", "the model block says them already; remove one of the two")
        if self.weights is None:
            if self.n_experts is not None:
                raise FieldFault("n_experts", "the model block says it already; remove it")
        elif self.published is None:
            raise FieldFault("published", "missing; weights without a source count nothing, add it")
        else:
            self._check_experts([w.group() for w in self.weights if w.kind == "experts"])
        return self

    def _check_experts(self, experts: list[WeightGroup]) -> None:
        copies = sum(g.copies for g in experts)
        if copies and not any(g.products for g in experts):
            raise FieldFault("weights", "no token visits an expert; set active of one above 0")
        if copies and self.n_experts is None:
            raise FieldFault("n_experts", "missing; there are weights of kind experts, so add it")
        if self.n_experts is not None and (copies == 0 or copies % self.n_experts):
            raise FieldFault(
                "n_experts",
                f"{self.n_experts} does not divide the {copies} copies of kind experts; "
                "change one of them",
            )

    @property
    def experts_per_layer(self) -> int | None:
        """Routed experts of a sparse layer; none in a dense model."""
        if self.model is None:
            return self.n_experts
        return None if self.model.moe is None else self.model.moe.n_experts
