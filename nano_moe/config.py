"""The recipe: what a run is, field by field.

A recipe has five parts: `model`, `data`, `optim`, `trainer` and a `seed`. Recipes are frozen and
plain: nothing here knows YAML (`recipe_file.py` does), tensors, Lightning or the command line.
Cross-field faults are raised as `FieldFault`, which names the field, the values and the remedy.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nano_moe.errors import UserError

DOMAINS = (
    "fiction_en",
    "fiction_fr",
    "geography",
    "law",
    "religion",
    "encyclopedia_en",
    "encyclopedia_es",
    "code_python",
)

SEES_THE_FUTURE = (
    "model.moe.routing: expert_choice sees the future, so its loss and samples mean nothing and "
    "are refused; train with token_choice to evaluate, compare or sample"
)


class FieldFault(ValueError):
    """A fault between fields; `field` is relative to the section that raises it."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _writable(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("holds a character that no file name or text can; remove it")
        return value


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
                f"{_nearest(self.d_ff, moe.n_active)}",
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


class HubConfig(Section):
    """A dataset of the Hugging Face hub, or a folder laid out like one, read as a stream."""

    dataset: str = Field(min_length=1, description="owner/name on the hub, or a folder here")
    config: str | None = Field(
        default=None, min_length=1, description="its configuration; omitted: its default"
    )
    split: str = Field(
        default="train", min_length=1, description="what is read of it; we hold out a part of it"
    )
    revision: str = Field(
        default="main", min_length=1, description="branch, tag or commit; not of a folder"
    )
    column: str = Field(default="text", min_length=1, description="the column that holds text")
    document_start: str | None = Field(
        default=None,
        min_length=1,
        description="a regular expression: rows that match it begin a document; omitted: all do",
    )
    take_bytes: int | None = Field(
        default=None,
        ge=1,
        le=2**50,
        description="UTF-8 bytes taken from its start at most, in whole documents; omitted: all",
    )

    @field_validator("document_start")
    @classmethod
    def _is_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error}); correct it") from error
        return pattern


class DataConfig(Section):
    """Where text comes from and how it becomes tokens."""

    files: tuple[str, ...] = Field(
        default=(), description="own files or folders (.txt .jsonl .parquet), instead of domains"
    )
    hub: HubConfig | None = Field(
        default=None, description="a dataset of the Hugging Face hub, instead of domains"
    )
    domains: tuple[str, ...] = Field(
        default=DOMAINS, description="embedded domains, read from installed packages"
    )
    bytes_per_domain: int = Field(
        default=2_500_000, ge=1, le=2**40, description="UTF-8 bytes taken of each domain at most"
    )
    tokenizer: Literal["bpe", "byte", "gpt2", "char", "file"] = Field(
        default="bpe", description="bpe is trained on the training split; file is tokenizer_file"
    )
    gpt2_ranks: str | None = Field(
        default=None, description="path of the r50k_base.tiktoken file; only for tokenizer: gpt2"
    )
    tokenizer_file: str | None = Field(
        default=None,
        min_length=1,
        description="a tokenizer.json, of Hugging Face or of a run, or its folder; only for "
        "tokenizer: file",
    )
    val_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of documents held out for validation"
    )
    cache: str = Field(default="data", description="folder in which prepared tokens land")

    @model_validator(mode="before")
    @classmethod
    def _own_files_replace_domains(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if isinstance(values.get("files"), str):
            values["files"] = [values["files"]]
        if isinstance(values.get("files"), list | tuple) and "" in values["files"]:
            raise FieldFault("files", "an empty path; name a file or folder")
        if values.get("files") or values.get("hub"):
            values["domains"] = []
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    @field_validator("domains")
    @classmethod
    def _known_domains(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        for name in domains:
            if name not in DOMAINS:
                raise ValueError(f"no domain '{name}'; there are {', '.join(DOMAINS)}")
        if len(set(domains)) < len(domains):
            raise ValueError("a domain is named twice; name each once")
        return domains

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.files and self.hub:
            raise FieldFault("hub", "text is named twice; give data.files or data.hub, not both")
        if not self.files and not self.hub and not self.domains:
            raise FieldFault("files", "no text is named; add data.files=PATH (a file or folder)")
        if self.tokenizer == "gpt2" and not self.gpt2_ranks:
            raise FieldFault(
                "gpt2_ranks",
                "tokenizer gpt2 needs it; set data.gpt2_ranks=PATH of r50k_base.tiktoken",
            )
        if (self.tokenizer == "file") != (self.tokenizer_file is not None):
            raise FieldFault(
                "tokenizer_file",
                f"tokenizer={self.tokenizer}, and tokenizer_file={self.tokenizer_file}; set both "
                "tokenizer=file and tokenizer_file=PATH of a tokenizer.json, or neither",
            )
        return self


class OptimConfig(Section):
    """The optimizer, its learning rates and their schedule."""

    name: Literal["muon", "adamw"] = Field(
        default="muon", description="muon: Muon for hidden matrices, AdamW for the rest"
    )
    lr: float = Field(
        gt=0, lt=1e30, description="peak rate of hidden matrices, in AdamW's scale for both"
    )
    embedding_lr: float | None = Field(
        default=None, gt=0, description="peak rate of embeddings, head and norms; omitted: lr"
    )
    expert_lr: float | None = Field(
        default=None, gt=0, description="peak rate of routed experts; omitted: lr"
    )
    router_lr: float | None = Field(
        default=None, gt=0, description="peak rate of routers; omitted: embedding_lr"
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled; hidden matrices and experts only"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first-moment decay")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's second-moment decay")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's Nesterov momentum")
    newton_schulz: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="precision of Muon's iteration; auto: bf16 where it is native"
    )
    grad_clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no clip")
    schedule: Literal["cosine", "wsd"] = Field(
        default="cosine", description="after warm-up; wsd: warmup-stable-decay"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear from 0 to the peak")
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="wsd: share of all steps in the final linear decay"
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="what the rate decays towards, as a share of the peak"
    )


class TrainerConfig(Section):
    """How long, in what batches, in what precision, and how often to look."""

    steps: int = Field(ge=1, le=2**31, description="optimizer steps")
    batch_size: int = Field(
        ge=1, le=2**20, description="sequences per micro-batch (B), of all processes together"
    )
    accumulate: int = Field(
        default=1, ge=1, le=2**20, description="micro-batches per optimizer step"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on GPUs that have it, else fp32"
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="auto: a GPU where there is one"
    )
    strategy: Literal["auto", "ddp", "fsdp", "ep"] = Field(
        default="auto",
        description="what several processes share: the batch (ddp), weights and optimizer state, "
        "too (fsdp), or the experts, too (ep); auto: one process, or ddp for several devices",
    )
    devices: int | Literal["auto"] = Field(
        default=1, description="processes on each node, a GPU for each; auto: every GPU"
    )
    nodes: int = Field(
        default=1, ge=1, le=2**12, description="machines; more than 1: started by torchrun or srun"
    )
    expert_ranks: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="ep: processes that share one set of experts; omitted: all",
    )
    compile: bool = Field(default=False, description="torch.compile of the decoder; needs g++")
    activation_checkpointing: bool = Field(
        default=False,
        description="keep only each block's input and compute it again in the backward pass",
    )
    val_every: int = Field(default=100, ge=1, le=2**31, description="steps between validations")
    save_every: int = Field(
        default=100, ge=1, le=2**31, description="steps between last.ckpt writes"
    )
    log_every: int = Field(default=10, ge=1, le=2**31, description="steps between rows of metrics")
    sample_prompt: str = Field(default="The", description="continued once at the end of training")

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        if self.devices != "auto" and not 1 <= self.devices <= 2**10:
            raise FieldFault("devices", f"{self.devices} processes on a node; name 1 to {2**10}")
        if self.expert_ranks is not None and self.strategy != "ep":
            raise FieldFault(
                "expert_ranks", f"strategy={self.strategy} shares no experts; set it to ep"
            )
        if self.compile and self.strategy in ("fsdp", "ep"):
            raise FieldFault(
                "compile",
                f"strategy={self.strategy} changes weights under the compiled decoder; set compile "
                "to false, or strategy to ddp",
            )
        return self

    @property
    def is_parallel(self) -> bool:
        """Whether processes form a group for it, were it a group of one."""
        return self.strategy != "auto" or self.devices != 1 or self.nodes > 1


class Recipe(Section):
    """A whole run. Paths in it are relative to the working directory."""

    seed: int = Field(default=1337, ge=0, lt=2**63, description="draws weights and data order")
    model: ModelConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig
    trainer: TrainerConfig

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.optim.warmup_steps >= self.trainer.steps and self.optim.warmup_steps > 0:
            raise FieldFault(
                "optim.warmup_steps",
                f"warmup_steps={self.optim.warmup_steps} leaves nothing of "
                f"trainer.steps={self.trainer.steps}; lower it",
            )
        if self.optim.expert_lr is not None and self.model.moe is None:
            raise FieldFault("optim.expert_lr", "there are no experts (model.moe is null); drop it")
        self._check_parallel()
        return self

    def _check_parallel(self) -> None:
        if self.trainer.strategy == "ep" and self.model.moe is None:
            raise FieldFault(
                "trainer.strategy",
                "ep shares experts, and model.moe is null; set it to fsdp or ddp",
            )
        if self.trainer.is_parallel and not self.model.is_causal:
            raise FieldFault(
                "model.moe.routing",
                "expert_choice chooses among all tokens of a batch, of which each process sees a "
                "part; set trainer.strategy to auto and trainer.devices to 1",
            )
        if self.trainer.devices != "auto":
            self.check_split(self.trainer.devices * self.trainer.nodes)

    def check_split(self, n: int) -> None:
        """Raises FieldFault where `n` processes cannot share the batch, or the experts, evenly."""
        if self.trainer.batch_size % n:
            raise FieldFault(
                "trainer.batch_size",
                f"{self.trainer.batch_size} sequences do not split over {n} processes; "
                f"nearest: {_nearest(self.trainer.batch_size, n)}",
            )
        if self.trainer.strategy != "ep" or self.model.moe is None:
            return
        shared = self.trainer.expert_ranks or n
        if n % shared:
            raise FieldFault(
                "trainer.expert_ranks",
                f"{n} processes do not form groups of {shared}; change it or trainer.devices",
            )
        if self.model.moe.n_experts % shared:
            raise FieldFault(
                "trainer.expert_ranks",
                f"{self.model.moe.n_experts} experts do not split over {shared} processes; "
                "set it to a number that divides both",
            )

    @property
    def tokens_per_step(self) -> int:
        return self.trainer.batch_size * self.trainer.accumulate * self.model.context


def _nearest(width: int, multiple: int) -> str:
    below = width // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)
