"""What a machine cannot hold, and what is no file, is said before any work begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nano_moe import recipe_file
from nano_moe.config import TrainerConfig
from nano_moe.device import check_memory, choose_device
from nano_moe.errors import UserError

DENSE = Path(__file__).parent.parent / "recipes" / "dense.yaml"


def test_a_batch_that_no_memory_holds_is_refused_and_named(recipe_of, dense_config):
    recipe = recipe_of(dense_config())
    check_memory(recipe)
    huge = TrainerConfig(steps=1, batch_size=2**20)
    config = dense_config(context=2**16)
    with pytest.raises(UserError, match=r"trainer\.batch_size: training needs at least .* GiB"):
        check_memory(recipe_of(config).model_copy(update={"trainer": huge}))


def test_experts_for_cpus_are_refused_on_a_gpu(recipe_of, moe_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    fused, auto = (moe_config(moe={"backend": name}) for name in ("fused", "auto"))
    with pytest.raises(UserError, match=r"model\.moe\.backend: fused runs on CPUs alone"):
        choose_device(recipe_of(fused))
    assert choose_device(recipe_of(fused, trainer={"accelerator": "cpu"})).type == "cpu"
    assert choose_device(recipe_of(auto)).type == "cuda"


def test_a_pipe_in_a_recipes_place_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="not a file"):
        recipe_file.load(tmp_path / "pipe.yaml")


def test_text_that_no_file_name_can_hold_is_refused():
    fields = ['data.files="a\\0b"', 'trainer.sample_prompt="\\ud800"']
    for field in fields:
        with pytest.raises(UserError, match="that no file name or text can|not YAML"):
            recipe_file.load(DENSE, [field])
