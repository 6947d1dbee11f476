"""`optim` and `trainer`: how the decoder is trained."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, field_validator, model_validator

from nano_moe.config.section import FieldFault, Section


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

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        default = OptimConfig.model_fields["momentum"].default
        if self.name == "adamw" and self.momentum != default:
            raise FieldFault(
                "momentum",
                f"{self.momentum} is Muon's, and name=adamw has none; set beta1, and leave this "
                f"at {default}",
            )
        return self


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

    @field_validator("devices", mode="before")
    @classmethod
    def _whole_or_auto(cls, value: object) -> object:
        """Else a wrong one would be two faults, one for each kind."""
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int)):
            given = json.dumps(value, default=str)[:80]
            raise ValueError(f"must be a whole number or auto, not {given}")
        return value

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
