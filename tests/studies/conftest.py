"""A study of two tiny members on a made-up text, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nano_moe.bench.recipes import QUICK, random_text, text_of

RECIPES = Path(__file__).parent.parent.parent / "recipes"
STUDY = """
study:
  order: 1
  title: Does it pay
  question: Does it pay?
  claim: It does.
  source: Somebody 2024, table 1
  seeds: [1, 2]
  fields: {{optim.warmup_steps: 0}}
  members:
    dense: {{recipe: {recipes}/dense.yaml, fields: {{model.d_ff: 384}}}}
    sparse:
      recipe: {recipes}/mixtral.yaml
      fields: {{model.moe.n_experts: 16, optim.lr: 0.005}}
  comparisons:
    - says: sparse ends below dense
      better: sparse
      than: dense
      equal: [tokens, active]
      smallest_effect: 0.02
"""


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    """written((old, new), …) -> the path of the study with these changes."""

    def write(*changes: tuple[str, str]) -> Path:
        text = STUDY.format(recipes=RECIPES)
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def small(tmp_path) -> dict[str, object]:
    """Fields under which a member trains in a second, on words in `tmp_path`."""
    words = tmp_path / "words.txt"
    words.write_text(random_text(5000))
    pairs = (field.partition("=") for field in (*QUICK, *text_of(words)))
    fields = {k: int(v) if v.isdecimal() else v.strip('"') for k, _, v in pairs}
    return {**fields, "trainer.steps": 4, "trainer.log_every": 1, "trainer.val_every": 100}
