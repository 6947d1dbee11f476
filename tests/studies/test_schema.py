"""What a study file may say, and the runs that it plans."""

from pathlib import Path

import pytest

from nano_moe.errors import UserError
from nano_moe.studies import schema

RECIPES = Path(__file__).parent.parent.parent / "recipes"
STUDY = """
study:
  question: Does it pay?
  claim: It does.
  source: Somebody 2024, table 1
  seeds: [1, 2]
  members:
    dense: {{recipe: {recipes}/dense.yaml}}
    sparse:
      recipe: {recipes}/mixtral.yaml
      fields: {{model.moe.n_experts: 16, optim.lr: 0.005}}
  comparisons:
    - {{name: equal tokens, better: sparse, than: dense, smallest_effect: 0.02}}
"""


@pytest.fixture
def written(tmp_path):
    def write(*changes: tuple[str, str]) -> Path:
        text = STUDY.format(recipes=RECIPES)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return write


def test_every_member_runs_once_per_seed_with_its_fields(written):
    path = written()
    planned = schema.plan(path, schema.load(path))
    assert [(p.member, p.seed) for p in planned] == [
        ("dense", 1), ("sparse", 1), ("dense", 2), ("sparse", 2),
    ]  # fmt: skip
    assert [p.recipe.seed for p in planned] == [1, 1, 2, 2]
    sparse = planned[1].recipe
    assert sparse.model.moe is not None and sparse.model.moe.n_experts == 16
    assert sparse.optim.lr == 0.005 and planned[0].recipe.model.moe is None


def test_extra_fields_win(written):
    path = written()
    extra = {"trainer.steps": 3, "optim.lr": 0.001, "optim.warmup_steps": 0}
    planned = schema.plan(path, schema.load(path), extra)
    assert {(p.recipe.trainer.steps, p.recipe.optim.lr) for p in planned} == {(3, 0.001)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("better: sparse", "better: spars", "no member 'spars'; there are dense, sparse"),
        ("than: dense", "than: sparse", "is the same member"),
        ("[1, 2]", "[1, 1]", "a seed is named twice"),
        ("[1, 2]", "[]", "seeds"),
        ("smallest_effect: 0.02", "smallest_effect: 0", "smallest_effect"),
        ("question: Does it pay?", "questions: Does it pay?", "did you mean 'question'"),
        ("  claim: It does.\n", "", "claim"),
    ],
)
def test_faults_are_one_line_with_the_file(written, old, new, message):
    with pytest.raises(UserError, match=message) as fault:
        schema.load(written((old, new)))
    assert "study.yaml" in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mixtral.yaml", "mixtrall.yaml", "mixtrall.yaml"),
        ("model.moe.n_experts", "model.moe.n_expert", "did you mean 'n_experts'"),
    ],
)
def test_a_member_at_fault_is_named(written, old, new, message):
    path = written((old, new))
    with pytest.raises(UserError, match=message) as fault:
        schema.plan(path, schema.load(path))
    assert "study.members.sparse" in str(fault.value)


def test_the_rule_is_all_but_the_caveats(written):
    rule = schema.load(written()).rule
    assert schema.load(written(("study:\n", "study:\n  caveats: [small]\n"))).rule == rule
    for old, new in (("0.02", "0.01"), ("[1, 2]", "[1, 3]"), ("n_experts: 16", "n_experts: 32")):
        assert schema.load(written((old, new))).rule != rule
