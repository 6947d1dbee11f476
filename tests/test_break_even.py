"""The share of a dense budget at which sparse runs end as low, on made-up runs of a known law."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_moe import runs
from nano_moe.break_even import break_even, end_of, share_at
from nano_moe.cli.main import main
from nano_moe.errors import UserError

STEP = 16 * 64  # tokens


def law(tokens: float) -> float:
    """What a dense run ends at: linear in the logarithm of its tokens."""
    return 9 - 0.5 * math.log(tokens)


@pytest.fixture
def finished(recipe_of, dense_config, moe_config, tmp_path):
    """Writes a run that ended at `ce` after `steps`, of which `done` were taken.

    It has experts unless its name begins with "dense".
    """

    def make(name: str, steps: int, ce: float, *, seed: int = 7, done: int | None = None, **more):
        trainer = {"steps": steps, "batch_size": 16, "precision": more.get("precision", "fp32")}
        config = dense_config if name.startswith("dense") else moe_config
        model = config(context=64, d_ff=more.get("d_ff", 64))
        recipe = recipe_of(model, trainer=trainer)
        recipe = recipe.model_copy(update={"seed": seed})
        run = runs.create(recipe, stem="x", name=name, root=tmp_path)
        tokens = STEP * (steps if done is None else done)
        run.metrics_file.write_text(
            "step,tokens,flops,seconds,train/ce,val/ce,val/bpb\n"
            f"1,{STEP},1,1,9,9.5,4\n{steps},{tokens},2,2,,{ce},2\n"
        )
        corpus = more.get("corpus", "c")
        runs.write_json(run.manifest_file, {"seed": seed, "corpus": {"sha256": corpus}})
        return run

    return make


def family(finished, needed: float, *, dense_steps: int = 1000, seed: int = 7, shares=(60, 75, 90)):
    """A dense run, and sparse ones that need `needed` of any dense budget."""
    name = f"{dense_steps}-{seed}"
    dense = finished(f"dense-{name}", dense_steps, law(dense_steps * STEP), seed=seed)
    sparse = [
        finished(f"s{share}-{name}", steps, law(steps * STEP / needed), seed=seed)
        for share in shares
        for steps in [dense_steps * share // 100]
    ]
    return dense, sparse


@pytest.mark.parametrize("needed", [0.61, 0.7, 0.75, 0.8, 0.89])
def test_the_share_that_was_put_in_comes_out(finished, needed):
    dense, sparse = family(finished, needed)
    (row,) = break_even([dense], sparse)
    assert row["share"] == pytest.approx(needed, rel=1e-6)
    assert row["above"] < needed <= row["below"]


def test_outside_of_the_budgets_there_is_a_bound_and_no_share(finished):
    dense, sparse = family(finished, 0.5)
    (row,) = break_even([dense], sparse)
    assert row["share"] is None and row["above"] is None and row["below"] == 0.6
    worse, others = family(finished, 0.95, seed=8)
    (row,) = break_even([worse], others)
    assert row["share"] is None and row["above"] == 0.9 and row["below"] is None


def test_runs_meet_those_of_their_seed_and_budget_alone(finished):
    pairs = [
        family(finished, 0.7, seed=1),
        family(finished, 0.8, seed=2),
        family(finished, 0.65, dense_steps=3000, seed=1),
    ]
    dense, sparse = [d for d, _ in pairs], [run for _, own in pairs for run in own]
    rows = break_even(dense, sparse)
    found = [(row["tokens"] // STEP, row["seed"], round(row["share"], 3)) for row in rows]
    assert found == [(1000, 1, 0.7), (1000, 2, 0.8), (3000, 1, 0.65)]


@given(st.lists(st.floats(0.1, 9.9), min_size=2, max_size=4, unique=True), st.floats(0, 10))
def test_a_share_lies_between_its_neighbours_and_exists_where_the_loss_is_crossed(losses, ce):
    losses.sort(reverse=True)
    shares = [(0.5 + 0.1 * i, loss) for i, loss in enumerate(losses)]
    share = share_at(ce, shares)
    assert (share is not None) == (losses[0] > ce >= losses[-1])
    if share is not None:
        above = max(x for x, loss in shares if loss > ce)
        below = min(x for x, loss in shares if loss <= ce)
        assert above <= share <= below + 1e-12


def test_a_run_that_has_not_ended_does_not_count(finished):
    with pytest.raises(UserError, match="schedule has not ended; finish it with"):
        end_of(finished("early", 1000, 4.0, done=900))


def test_other_text_and_missing_budgets_are_one_line(finished):
    dense, sparse = family(finished, 0.7)
    foreign = finished("foreign", 800, 3.0, corpus="d")
    with pytest.raises(UserError, match="different text"):
        break_even([dense], [*sparse, foreign])
    with pytest.raises(UserError, match="no sparse run of seed 7 has between 0.5 and all"):
        break_even([dense], [finished("short", 100, 4.0)])


def test_points_that_do_not_compare_are_one_line(finished):
    dense, sparse = family(finished, 0.7)
    with pytest.raises(UserError, match="s60-1000-7 and other differ in model.d_ff"):
        break_even([dense], [*sparse, finished("other", 800, 3.0, d_ff=72)])
    with pytest.raises(UserError, match="same seed and budget; drop one"):
        break_even([dense], [*sparse, finished("again", 750, 3.0)])
    with pytest.raises(UserError, match="narrow was trained in bf16 and dense-1000-7 in fp32"):
        break_even([dense], [finished("narrow", 750, 3.0, precision="bf16")])
    with pytest.raises(UserError, match="its loss is nan; leave it out"):
        break_even([dense], [finished("broken", 800, math.nan)])


def test_a_run_among_those_of_the_other_side_is_one_line(finished):
    dense, sparse = family(finished, 0.7)
    with pytest.raises(UserError, match="s60-1000-7: has experts; name it among the other side's"):
        break_even(sparse, [dense])
    with pytest.raises(UserError, match="dense-1000-7: has no experts"):
        break_even([dense], [*sparse, dense])


def test_a_shorter_run_that_is_lower_already_leaves_a_bound():
    assert share_at(3.66, [(0.6, 3.60), (0.75, 3.70), (0.9, 3.65)]) is None


@pytest.mark.parametrize("ratio", ["0", "-1", "nan", "inf"])
def test_a_step_ratio_is_a_positive_number(finished, ratio, capsys):
    dense, sparse = family(finished, 0.7)
    sides = ["--dense", str(dense.path), "--sparse", *(str(run.path) for run in sparse)]
    assert main(["break-even", *sides, f"--step-ratio={ratio}"]) == 2
    assert "--step-ratio" in capsys.readouterr().err


def test_the_verb_prints_shares_their_mean_and_times(finished, capsys):
    pairs = [family(finished, needed, seed=seed) for seed, needed in ((1, 0.7), (2, 0.8))]
    dense = [str(d.path) for d, _ in pairs]
    sparse = [str(run.path) for _, own in pairs for run in own]
    arguments = ["break-even", "--dense", *dense, "--sparse", *sparse]
    assert main([*arguments, "--step-ratio", "1.2"]) == 0
    out = capsys.readouterr().out
    for cell in ("1.02 M", "at 0.75", "0.700", "0.840", "0.800", "0.960", "mean of 2", "0.750"):
        assert cell in out
    assert main(arguments) == 0
    assert "time" not in capsys.readouterr().out
