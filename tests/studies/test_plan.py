"""The runs that a study plans, and that they are as fair as it says."""

from pathlib import Path

import pytest

from nano_moe import recipe_file
from nano_moe.errors import UserError
from nano_moe.studies import plan, schema

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def planned(path, extra=None):
    return plan.plan(path, schema.load(path), extra)


def check(path):
    study = schema.load(path)
    plan.check_fair(path, study, plan.plan(path, study))


def test_every_member_runs_once_per_seed_with_its_fields(written):
    runs = planned(written())
    assert [(p.member, p.seed) for p in runs] == [
        ("dense", 1), ("sparse", 1), ("dense", 2), ("sparse", 2),
    ]  # fmt: skip
    assert [p.recipe.seed for p in runs] == [1, 1, 2, 2]
    assert {p.recipe.optim.warmup_steps for p in runs} == {0}
    sparse = runs[1].recipe
    assert sparse.model.moe is not None and sparse.model.moe.n_experts == 16
    assert sparse.optim.lr == 0.005 and runs[0].recipe.model.moe is None


def test_extra_fields_win(written):
    extra = {"trainer.steps": 3, "optim.lr": 0.001}
    runs = planned(written(), extra)
    assert {(p.recipe.trainer.steps, p.recipe.optim.lr) for p in runs} == {(3, 0.001)}


def test_a_grid_runs_every_member_at_every_value(written):
    path = written(("  members:", "  figure: grid\n  members:"), ("[1, 2]", "[1]"))
    text = path.read_text().split("  comparisons:")[0]
    path.write_text(text + "  grid: {field: optim.lr, values: [0.1, 0.2, 0.3, 0.4]}\n")
    runs = planned(path)
    assert len(runs) == 2 * 4
    assert [p.recipe.optim.lr for p in runs[4:8]] == [0.1, 0.2, 0.3, 0.4]
    assert runs[4].member == "sparse @ 0.1"


def test_ranks_must_divide_the_experts(written):
    measured = "sparse:\n      measure: true\n      expert_ranks: 3\n"
    figures = ("than: dense", "than: sparse\n      figure: rest_ms\n      than_figure: step_ms")
    with pytest.raises(UserError, match="sparse.expert_ranks: 3 must divide"):
        planned(written(("sparse:\n", measured), figures))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mixtral.yaml", "mixtrall.yaml", "mixtrall.yaml"),
        ("model.moe.n_experts", "model.moe.n_expert", "did you mean 'n_experts'"),
        ("mixtral.yaml", "schemes/expert-choice.yaml", "sees the future"),  # trap T13
    ],
)
def test_a_member_at_fault_is_named(written, old, new, message):
    with pytest.raises(UserError, match=message) as fault:
        planned(written((old, new)))
    assert "study.members.sparse" in str(fault.value)


@pytest.mark.parametrize(
    "fields", ["look: offload", "look: specialization", "measure: true, expert_budget: 25%"]
)
def test_a_dense_member_has_no_experts(written, fields):
    figure = "memory_gb" if "measure" in fields else "ce"
    changes = [
        ("dense: {recipe", f"dense: {{{fields}, recipe"),
        ("equal", f"figure: {figure}\n      equal"),
    ]
    if "measure" in fields:
        changes.append(("sparse:\n", "sparse:\n      measure: true\n      expert_budget: 25%\n"))
        changes.append(("  members:", "  figure: memory\n  members:"))
    path = written(*changes)
    with pytest.raises(UserError, match="study.members.dense.*a dense member has no experts"):
        planned(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{model.d_ff: 384}",
            "{model.n_heads: 8, model.head_dim: 32}",
            "attention and norms are not",
        ),
        ("model.d_ff: 384", "model.d_ff: 388", "active: sparse has 589,824 and dense 595,968"),
        ("{model.d_ff: 384}", "{model.d_ff: 384, trainer.steps: 499}", "tokens: sparse has"),
        ("[tokens, active]", "[total]", "total: sparse has 4,718,592 and dense 589,824"),
        ("[tokens, active]", "[flops]", "flops"),  # the routers of 16 experts
        ("[tokens, active]", "[time]", "step_times: has none of sparse"),
    ],
)
def test_an_unfair_comparison_is_refused(written, old, new, message):
    check(written())
    with pytest.raises(UserError, match=message):
        check(written((old, new)))


def test_time_is_equal_where_steps_and_their_time_make_up_for_each_other(written):
    changes = (
        ("[tokens, active]", "[time]"),
        ("  members:", "  step_times: {dense: 1, sparse: 1.25}\n  members:"),
    )
    with pytest.raises(UserError, match="time: sparse has 625 and dense 500"):
        check(written(*changes))
    check(written(*changes, ("optim.lr: 0.005", "trainer.steps: 400")))


def test_ffn_parameters_are_experts_and_ffn_without_routers():
    dense = recipe_file.load(RECIPES / "dense.yaml", ["model.d_ff=384"])
    fine = recipe_file.load(RECIPES / "deepseek.yaml")
    layer = 3 * 128 * 384
    assert plan.ffn_params(dense) == (4 * layer, 4 * layer)
    assert plan.ffn_params(fine) == (4 * 4 * layer, 4 * layer)
