"""Figures of several runs, by hand."""

import subprocess

import pytest

from nano_moe import recipe_file
from nano_moe.bench.recipes import FOLDER
from nano_moe.errors import UserError
from nano_moe.studies import results, schema, verdicts
from nano_moe.studies.schema import Comparison, Recovered, Trend

NAMES = Recovered(base="dense", part="sparse", whole="large")
MEMBERS = {
    "dense": {"train_flops": 10},
    "sparse": {"train_flops": 12},
    "large": {"train_flops": 48},
}


def runs(**losses):
    return {name: {s: {"ce": ce} for s, ce in enumerate(of)} for name, of in losses.items()}


def test_a_share_is_of_the_mean_gain():
    losses = runs(dense=(4.0, 4.1), sparse=(3.95, 4.07), large=(3.9, 4.01))
    found = verdicts.recovered(NAMES, losses, MEMBERS)
    assert found["gain"] == pytest.approx(0.04) and found["of"] == pytest.approx(0.095)
    assert found["mean"] == pytest.approx(0.04 / 0.095) and found["flops_share"] == 0.25


def test_there_is_no_share_of_a_gain_within_noise():
    losses = runs(dense=(4.0, 4.1, 4.2), sparse=(3.9, 4.0, 4.1), large=(3.99, 4.11, 4.19))
    assert verdicts.recovered(NAMES, losses, MEMBERS) is None


@pytest.mark.parametrize(
    ("relative", "mean", "verdict"), [(False, 1.0, "reproduced"), (True, 0.693147, "reproduced")]
)
def test_a_gain_is_a_difference_or_the_logarithm_of_a_factor(relative, mean, verdict):
    one = Comparison(
        says="s", better="a", than="b", relative=relative, smallest_effect=0.9, figure="max_vio"
    )
    sides = {"a": {1: {"max_vio": 1.0}, 2: {"max_vio": 1.0}}}
    sides["b"] = {1: {"max_vio": 2.0}, 2: {"max_vio": 2.0}}
    found = verdicts.compare(one, sides, smoke=False)
    assert found["mean"] == pytest.approx(mean, rel=1e-5)
    assert (found["verdict"], found["n"]) == (verdict, 2)
    assert verdicts.compare(one, sides, smoke=True)["verdict"] == verdicts.WITHHELD


def test_a_member_is_compared_with_itself_in_another_figure():
    one = Comparison(
        says="s", better="a", than="a", figure="class_share", than_figure="domain_share",
        higher=True, smallest_effect=0.1,
    )  # fmt: skip
    sides = {"a": {s: {"class_share": 0.5 + s / 100, "domain_share": 0.2} for s in (1, 2)}}
    found = verdicts.compare(one, sides, smoke=False)
    assert found["gains"] == pytest.approx({"1": 0.31, "2": 0.32})


def test_a_seed_that_one_side_lacks_is_left_out():
    one = Comparison(says="s", better="a", than="b", smallest_effect=0.1)
    sides = {"a": {1: {"ce": 1.0}}, "b": {1: {"ce": 2.0}, 2: {"ce": 9.0}}}
    assert verdicts.compare(one, sides, smoke=False)["gains"] == {"1": 1.0}


def test_a_trend_is_the_slope_per_doubling_of_every_line_and_seed():
    of = Trend(
        says="s", per="doubling of tokens", smallest_effect=0.1,
        lines=({"1": ("s1", "d1"), "2": ("s2", "d2"), "4": ("s4", "d4")},),
    )  # fmt: skip
    leads = {1: (0.1, 0.3, 0.5), 2: (0.2, 0.3, 0.4)}  # 0.2 and 0.1 a doubling
    sides = {}
    for place, x in enumerate((1, 2, 4)):
        sides[f"d{x}"] = {seed: {"ce": 4.0} for seed in leads}
        sides[f"s{x}"] = {seed: {"ce": 4.0 - lead[place]} for seed, lead in leads.items()}
    found = verdicts.trend(of, sides, smoke=False)
    assert found["gains"] == pytest.approx({"line 1, seed 1": 0.2, "line 1, seed 2": 0.1})
    assert found["mean"] == pytest.approx(0.15) and found["n"] == 2


def test_a_trend_of_members_is_how_their_figure_falls():
    of = Trend(
        says="s", per="doubling of experts", smallest_effect=0.1,
        lines=({"4": "a", "8": "b", "16": "c"},),
    )  # fmt: skip
    sides = {name: {1: {"ce": ce}} for name, ce in (("a", 4.0), ("b", 3.9), ("c", 3.8))}
    assert verdicts.trend(of, sides, smoke=False)["mean"] == pytest.approx(0.1)


def test_a_rule_is_as_old_as_the_last_commit_that_changed_what_decides(written):
    path = written()
    again = path.with_name("again.yaml")
    again.write_text("base: study.yaml\nstudy: {repeats: study, seeds: [3, 4]}\n")

    def git(*arguments):
        named = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(path.parent), *named, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(message):
        git("add", "-A")
        git("commit", "-qm", message)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    first = commit("first")
    path.write_text(path.read_text().replace("Does it pay?", "Does it?"))
    commit("words")
    for file in (path, again):
        assert results.introduced(file, schema.load(file).rule) == first
    path.write_text(path.read_text().replace("0.02", "0.01"))
    assert results.introduced(path, schema.load(path).rule) is None
    third = commit("rule")
    for file in (path, again):
        assert results.introduced(file, schema.load(file).rule) == third


def test_a_stored_recipe_has_later_fields_at_their_defaults():
    recipe = recipe_file.load(FOLDER / "mixtral.yaml")
    stored = results.what_runs(recipe)
    assert results.as_now(stored) == stored
    del stored["trainer"]["compile"], stored["model"]["moe"]["n_groups"]
    assert results.as_now(stored) == results.what_runs(recipe)
    stored["model"]["of_a_later_version"] = 1
    with pytest.raises(UserError, match="none of this version"):
        results.as_now(stored)
