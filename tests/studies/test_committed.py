"""The studies of this repository: each runs in small, and results, rules and README agree."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from nano_moe import recipe_file
from nano_moe.studies import catalogue, plan, report, results, sections, verdicts
from nano_moe.studies.figures import draw
from nano_moe.studies.verdicts import WITHHELD

STUDIES = catalogue.everything()
FINISHED = [one for one in STUDIES if one.results.is_file()]
by_name = pytest.mark.parametrize("found", STUDIES, ids=lambda one: one.name)
finished = pytest.mark.parametrize("found", FINISHED, ids=lambda one: one.name)
# Those that run the same code again, and one of minutes, whose parts test_exchanging.py runs.
SLOW = {one.name for one in STUDIES if one.study.repeats} | {"all-to-all"}
small = pytest.mark.parametrize(
    "found",
    [pytest.param(one, marks=[pytest.mark.slow] * (one.name in SLOW)) for one in STUDIES],
    ids=lambda one: one.name,
)
has_results = pytest.mark.skipif(not FINISHED, reason="no study has been run yet")
README = report.README.read_text(encoding="utf-8")


def test_the_first_studies_have_results():
    assert {one.name for one in FINISHED} >= {
        "sparse-vs-dense", "ladder", "top-k", "collapse", "dead-router", "memory-vs-compute",
        "learning-rates", "precision",
    }  # fmt: skip
    assert len({one.study.order for one in STUDIES}) == len(STUDIES)


@by_name
def test_a_study_is_fair_and_its_runs_are_of_one_budget(found):
    planned = plan.plan(found.path, found.study, catalogue.FULL)
    plan.check_fair(found.path, found.study, planned)
    trained = [one for one in planned if not one.measure]
    assert {one.recipe.tokens_per_step for one in trained} == {4096}
    assert max(one.recipe.trainer.steps for one in trained) <= 1000


@pytest.fixture(scope="module")
def place():
    with catalogue.smoke_place() as found:
        yield found


@small
def test_a_study_runs_in_small_and_withholds_its_verdicts(found, place, request):
    if any(member.expert_budget for member in found.study.members.values()):
        request.getfixturevalue("on_disk")
    threads = torch.get_num_threads()
    content = catalogue.smoke(found, place)
    assert torch.get_num_threads() == threads
    json.dumps(content, allow_nan=False)
    verdicts = {one["verdict"] for one in content.get("comparisons", [])}
    assert verdicts <= {WITHHELD}
    assert sections.section(found, content) and draw(content, found.study.figure)


@has_results
@by_name
def test_a_member_takes_a_rate_as_good_as_the_best_of_its_class(found):
    """To what one seed of the grid can tell."""
    catalogue.check_tuned(found, plan.plan(found.path, found.study))


@has_results
@by_name
def test_every_trained_member_names_its_class(found):
    for one in plan.plan(found.path, found.study):
        tuned = [name for name in found.study.members if name == one.member]
        if tuned and not one.measure:
            assert found.study.members[one.member].tuned_as, one.member


@finished
def test_results_are_of_the_rule_that_the_file_states(found):
    assert results.read(found.results)["rule"] == found.study.rule


@finished
def test_results_have_every_run_and_no_optimum_at_an_edge(found):
    content = results.read(found.results)
    assert content["tier"] == "full"
    runs = {(run["member"], run["seed"]) for run in content["runs"]}
    planned = {(one.member, one.seed) for one in plan.plan(found.path, found.study)}
    assert runs == planned
    edges = [
        name for name, row in content.get("grid", {}).get("members", {}).items() if row["at_edge"]
    ]
    assert edges == []


@finished
def test_verdicts_follow_from_the_runs(found):
    """Whoever edits a results file, or how verdicts are read, has to say so here."""
    content, study = results.read(found.results), found.study
    by_member = results.by_member(content["runs"])
    judged = [
        *(verdicts.compare(one, by_member, smoke=False) for one in study.comparisons),
        *(verdicts.trend(one, by_member, smoke=False) for one in study.trends),
    ]
    assert json.loads(json.dumps(judged)) == content.get("comparisons", [])
    if study.recovered is not None:
        shares = verdicts.recovered(study.recovered, by_member, content["members"])
        assert json.loads(json.dumps(shares)) == content["recovered"]
    if study.grid is not None:
        assert results.grid(study, content["runs"]) == content["grid"]


@finished
def test_results_are_of_the_recipes_that_are_here(found):
    stored = results.read(found.results)["members"]
    for one in plan.plan(found.path, found.study, catalogue.FULL):
        recipe = results.as_now(stored[one.member]["recipe"])
        assert recipe == results.what_runs(one.recipe), one.member


@finished
def test_the_rule_was_in_force_when_its_own_runs_began(found):
    """Unbroken from the commit that the results name to that of each run.

    All but runs that another study has, too: those are older than this one may be.
    """
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no history here to look the rule up in")
    content = results.read(found.results)
    shared = {
        run["key"]
        for other in FINISHED
        if other.name != found.name
        for run in results.read(other.results)["runs"]
    }
    own = {run["git_commit"] for run in content["runs"] if run["key"] not in shared}
    rule, named = found.study.rule, content["rule_commit"]
    assert git("merge-base", "--is-ancestor", named, "HEAD") is not None
    for commit in {commit.removesuffix("+dirty") for commit in own}:
        assert results.introduced(found.path, rule, commit) == named


def git(*arguments):
    """What it says; None where it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=catalogue.STUDIES, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


@finished
def test_runs_of_a_seed_saw_the_same_text(found):
    content = results.read(found.results)
    assert len({run["corpus"] for run in content["runs"] if "corpus" in run}) == 1


@has_results
def test_readme_and_report_say_what_the_results_say():
    reported = report.finished()
    block = README.split(report.BEGIN)[1].split(report.END)[0]
    assert block == "\n" + report.readme_block(reported, report.unrun())
    document = catalogue.STUDIES / "results" / "RESULTS.md"
    assert document.read_text(encoding="utf-8") == report.document_of(reported)
    for one in reported:
        assert one.found.results.with_suffix(".png").is_file()


@has_results
def test_every_anchor_of_the_readme_is_a_heading():
    text = (catalogue.STUDIES / "results" / "RESULTS.md").read_text(encoding="utf-8")
    headings = {report.anchor(line[3:]) for line in text.splitlines() if line.startswith("## ")}
    block = README.split(report.BEGIN)[1].split(report.END)[0]
    named = {part.split(")")[0] for part in block.split("RESULTS.md#")[1:]}
    assert named and named <= headings


def test_a_resolved_recipe_of_a_study_trains_alone(tmp_path):
    one = plan.plan(STUDIES[0].path, STUDIES[0].study, catalogue.FULL)[0]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_file.dump(one.recipe))
    assert recipe_file.load(path) == one.recipe
