"""`model`: the decoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nano_moe.config.moe import MoEConfig
from nano_moe.config.section import FieldFault, Section, nearest
from nano_moe.errors import UserError

SEES_THE_FUTURE = (
    "model.moe.routing: expert_choice sees the future, so its loss and samples mean nothing and "
    "are refused; train with token_choice to evaluate, compare or sample"
)


class MLAConfig(Section):
    """Multi-head latent attention: keys and values rebuilt from one small vector per token."""

    kv_lora_rank: int = Field(ge=1, le=2**20, description="width of the latent of keys and values")
    q_lora_rank: int | None = Field(
        default=None, ge=1, le=2**20, description="width of the queries' latent; omitted: none"
    )
    qk_nope_head_dim: int = Field(
        ge=1, le=2**16, description="width of a head's query and key without position"
    )
    qk_rope_head_dim: int = Field(
        ge=2, le=2**16, description="width of its rotated part; the key's is shared by all heads"
    )
    v_head_dim: int = Field(ge=1, le=2**16, description="width of a head's value")

    @model_validator(mode="after")
    def _check(self) -> MLAConfig:
        if self.qk_rope_head_dim % 2:
            raise FieldFault(
                "qk_rope_head_dim", f"RoPE turns pairs, and {self.qk_rope_head_dim} is odd; add 1"
            )
        return self


class ModelConfig(Section):
    """The decoder: pre-norm, RMSNorm, RoPE, GQA or latent attention, SwiGLU or GELU, no biases."""

    vocab_size: int = Field(
        ge=2, le=2**24, description="rows of the embedding; the tokenizer must fit"
    )
    context: int = Field(ge=2, le=2**24, description="longest sequence in tokens (T)")
    n_layers: int = Field(ge=1, le=10_000, description="decoder blocks")
    d_model: int = Field(ge=2, le=2**20, description="residual width (D)")
    n_heads: int = Field(ge=1, le=2**16, description="query heads (H)")
    n_kv_heads: int | None = Field(
        default=None, ge=1, le=2**16, description="key/value heads; omitted: n_heads; fewer: GQA"
    )
    head_dim: int | None = Field(
        default=None, ge=2, le=2**16, description="width of one head; omitted: d_model / n_heads"
    )
    mla: MLAConfig | None = Field(
        default=None, description="null: grouped-query attention; a block: latent attention"
    )
    d_ff: int = Field(
        ge=1, le=2**24, description="hidden width of a dense FFN; sizes the experts too"
    )
    activation: Literal["swiglu", "gelu"] = Field(
        default="swiglu", description="of FFN and experts; gelu has no gate, so 2 matrices, not 3"
    )
    qk_norm: bool = Field(default=False, description="RMSNorm of each query and key head")
    tie_embeddings: bool = Field(default=True, description="the head reuses the embedding")
    rope_theta: float = Field(default=10_000.0, gt=0, description="RoPE base")
    norm_eps: float = Field(default=1e-6, gt=0, description="epsilon of every RMSNorm")
    init_std: float = Field(
        default=0.02, gt=0, description="std of all initial weights, before residual scaling"
    )
    moe: MoEConfig | None = Field(default=None, description="null: dense; a block: sparse")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self._check_heads()
        if self.moe is not None:
            self._check_sparse_layers(self.moe)
            self._check_expert_width(self.moe)
        return self

    def _check_heads(self) -> None:
        if self.mla is not None:
            for field in ("n_kv_heads", "head_dim", "qk_norm"):
                if getattr(self, field):
                    raise FieldFault(field, "has no meaning with mla, which sizes heads; remove it")
            return
        if self.head_dim is None and self.d_model % self.n_heads:
            raise FieldFault(
                "n_heads",
                f"n_heads={self.n_heads} does not divide d_model={self.d_model}; "
                "change one of them or set head_dim",
            )
        if self.head_size % 2:
            raise FieldFault(
                "head_dim", f"RoPE needs an even head_dim, not {self.head_size}; change n_heads"
            )
        if self.n_heads % self.kv_heads:
            raise FieldFault(
                "n_kv_heads",
                f"n_kv_heads={self.kv_heads} does not divide n_heads={self.n_heads}; "
                "change one of them",
            )

    def _check_sparse_layers(self, moe: MoEConfig) -> None:
        if moe.router_window > self.context:
            raise FieldFault(
                "moe.router_window",
                f"{moe.router_window} positions are more than context={self.context}; lower it",
            )
        if not any(moe.is_sparse(layer) for layer in range(self.n_layers)):
            raise FieldFault(
                "moe.first_k_dense" if moe.first_k_dense else "moe.every_n_layers",
                f"first_k_dense={moe.first_k_dense} and every_n_layers={moe.every_n_layers} leave "
                f"none of n_layers={self.n_layers} sparse; lower them, or write moe: null",
            )

    def _check_expert_width(self, moe: MoEConfig) -> None:
        if moe.d_expert is None and self.d_ff % moe.n_active:
            raise FieldFault(
                "moe.d_expert",
                f"omitted, and d_ff={self.d_ff} does not split into top_k + n_shared_experts="
                f"{moe.n_active} experts of one width; nearest d_ff: "
                f"{nearest(self.d_ff, moe.n_active)}",
            )
        if moe.init_from is not None and self.expert_width != self.d_ff:
            raise FieldFault(
                "moe.d_expert",
                f"init_from copies the dense FFN into each expert, so {self.expert_width} must be "
                f"d_ff={self.d_ff}; set d_expert to {self.d_ff}",
            )

    @property
    def head_size(self) -> int:
        """Width of one head of grouped-query attention."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def rope_size(self) -> int:
        """Width of what RoPE turns."""
        return self.head_size if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert (F), derived from equal active FLOPs when not given."""
        assert self.moe is not None
        return self.moe.d_expert or self.d_ff // self.moe.n_active

    @property
    def is_causal(self) -> bool:
        """Whether, in evaluation, a logit depends on its past alone: not where experts choose."""
        return self.moe is None or self.moe.routing != "expert_choice"

    def check_causal(self) -> None:
        """Raises UserError for a model whose predictions look at what they predict."""
        if not self.is_causal:
            raise UserError(SEES_THE_FUTURE)

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and self.moe.is_sparse(layer)
