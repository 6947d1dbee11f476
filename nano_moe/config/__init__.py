"""The recipe: what a run is, field by field.

A recipe has five parts: `model` (model.py, its `moe` in moe.py), `data` (data.py), `optim` and
`trainer` (training.py) and a `seed`. Recipes are frozen and plain: nothing here knows YAML
(`recipe_file.py` does), tensors, Lightning or the command line. Cross-field faults are raised as
`FieldFault`, which names the field, the values and the remedy.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from nano_moe.config.data import DOMAINS, DataConfig, HubConfig
from nano_moe.config.model import SEES_THE_FUTURE, MLAConfig, ModelConfig
from nano_moe.config.moe import MoEConfig
from nano_moe.config.section import FieldFault, Section, nearest
from nano_moe.config.training import OptimConfig, TrainerConfig

__all__ = [
    "DOMAINS", "SEES_THE_FUTURE", "DataConfig", "FieldFault", "HubConfig", "MLAConfig", "MoEConfig",
    "ModelConfig", "OptimConfig", "Recipe", "Section", "TrainerConfig",
]  # fmt: skip


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
                f"nearest: {nearest(self.trainer.batch_size, n)}",
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
