"""Run folders of tiny drawn models, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_cases import drawn

from nano_moe import recipe_file, runs
from nano_moe.config import ModelConfig, Recipe
from nano_moe.files import write_text
from nano_moe.model.gpt import GPT
from nano_moe.runs import Run
from nano_moe.text.tokenizer import ByteTokenizer, Tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_of(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> Callable[..., tuple[Run, GPT]]:
    """run_of(config, tokenizer, seed=0) -> a finished run's folder and its model."""

    def make(
        config: ModelConfig, tokenizer: Tokenizer | None = None, seed: int = 0, name: str = "run"
    ) -> tuple[Run, GPT]:
        run, recipe = Run(tmp_path / name), recipe_of(config, data={"tokenizer": "byte"})
        run.path.mkdir()
        model = drawn(GPT(config), seed)
        write_text(run.recipe_file, recipe_file.dump(recipe))
        (tokenizer or ByteTokenizer()).save(run.tokenizer_file)
        manifest = {"schema": 1, "git_commit": "0123abc", "corpus": {"sha256": "c" * 64}}
        runs.write_json(run.manifest_file, manifest)
        run.metrics_file.write_text("step,val/ce,val/bpb\n4,2.5,1.25\n")
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"nano_moe": {"schema": 1}, "state_dict": state, "global_step": 4}, run.best)
        return run, model

    return make
