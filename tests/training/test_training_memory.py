"""A training holds what the footprint says: resident memory at sizes where it matters.

Run it alone to see the figures: pytest -m slow -s tests/training/test_training_memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nano_moe.config import Recipe
from nano_moe.footprint import PRODUCT_BYTES, compiled_at_most, peak
from nano_moe.training.fit import LARGE

PROBE = Path(__file__).parent / "memory_probe.py"
EIGHT = {"n_experts": 8, "top_k": 2, "load_balancing_loss": 0.01}
SIXTY_FOUR = {"n_experts": 64, "top_k": 8, "load_balancing_loss": 0.01}
BF16, AGAIN = {"precision": "bf16"}, {"activation_checkpointing": True}
FEW_TOKENS = {"vocab_size": 512}  # else the logits are the largest part of a checkpointed step
WIDE = {"d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "d_ff": 2816, "n_layers": 3}
WIDE_EXPERTS = {"d_model": 384, "n_layers": 3, "moe": EIGHT | {"d_expert": 1536}}

# model, trainer, optimizer
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {"batch_size": 64}, {}),
    "dense, bf16, checkpointed": (
        FEW_TOKENS | {"d_ff": 1536}, {"batch_size": 96} | BF16 | AGAIN, {},
    ),
    "8 top-2, checkpointed": (
        FEW_TOKENS | {"d_ff": 2048, "moe": EIGHT}, {"batch_size": 64} | AGAIN, {},
    ),
    "8 top-2, bf16": ({"moe": EIGHT}, {"batch_size": 112} | BF16, {}),
    "64 top-8": ({"d_ff": 512, "moe": SIXTY_FOUR}, {"batch_size": 60}, {}),
    "64 top-8, bf16, checkpointed": (
        FEW_TOKENS | {"d_ff": 1024, "moe": SIXTY_FOUR}, {"batch_size": 128} | BF16 | AGAIN, {},
    ),
    "a large dense model, bf16, AdamW": (WIDE, {"batch_size": 1} | BF16, {"name": "adamw"}),
    "a large sparse model": (WIDE_EXPERTS, {"batch_size": 2}, {"newton_schulz": "fp32"}),
}  # fmt: skip


def recipe_of_case(case: str) -> Recipe:
    """Two steps: the optimizer's state is there in the second alone."""
    model, trainer, optim = CASES[case]
    sizes = {
        "vocab_size": 2048,
        "context": 256,
        "n_layers": 2,
        "d_model": 128,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 384,
        "qk_norm": True,
    }
    return Recipe.model_validate(
        {
            "model": sizes | model,
            "data": {"files": ["text.txt"], "tokenizer": "byte", "cache": "cache"},
            "optim": {"lr": 0.01} | optim,
            "trainer": {"steps": 2, "precision": "fp32", "accelerator": "cpu"} | trainer,
        }
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")
@pytest.mark.parametrize("case", CASES)
def test_resident_memory_grows_by_what_is_predicted(case, tmp_path):
    recipe = recipe_of_case(case)
    predicted, at_most = (f(recipe, recipe.trainer.precision) for f in (peak, compiled_at_most))
    assert predicted.bytes >= LARGE
    held = probe(recipe, tmp_path)
    grown, compiled = held["peak"] - held["idle"], PRODUCT_BYTES * held["compiled"]
    print(
        f"\n{case}: {grown / 1e6:.0f} MB, predicted {predicted.bytes / 1e6:.0f} at the "
        f"{predicted.moment} and {compiled / 1e6:.0f} of products, at most {at_most / 1e6:.0f}"
    )
    assert compiled <= at_most
    assert 1 / 1.15 <= grown / (predicted.bytes + compiled) <= 1.15


def probe(recipe: Recipe, folder: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(PROBE), recipe.model_dump_json()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROBE.parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
