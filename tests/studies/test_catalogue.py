"""Studies by name: what is refused before hours are spent, or afterwards."""

import json
import shutil

import pytest

from nano_moe.cli.main import main
from nano_moe.errors import UserError
from nano_moe.studies import catalogue, report


@pytest.fixture
def shelf(written, tmp_path):
    """A folder of studies: the tests' own and the grid."""
    shutil.copy(catalogue.STUDIES / "learning-rates.yaml", tmp_path)

    def make(*changes):
        written(*changes)
        return catalogue.find("study", tmp_path)

    return make


def test_a_study_is_found_by_its_name_alone(shelf, tmp_path):
    assert shelf().study.title == "Does it pay"
    ways = ("../study", "./study", str(tmp_path / "study"), f"../{tmp_path.name}/study")
    for name in ("studdy", "recipes/studies/study.yaml", *ways):
        with pytest.raises(UserError, match="did you mean study"):
            catalogue.find(name, tmp_path)


def test_a_class_that_the_grid_does_not_know_is_refused_before_any_run(shelf, tmp_path):
    found = shelf(("sparse:\n", "sparse:\n      tuned_as: top-22\n"))
    with pytest.raises(UserError, match="has no 'top-22'; there are dense, dense-total"):
        catalogue.smoke(found, catalogue.Place(tmp_path / "studies", ()))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ([("[1, 2]", "[2, 3]")], "has seed 2, too; a second draw needs others"),
        ([("[1, 2]", "[3, 4]"), ("0.02", "0.03")], "has another rule; begin this file with base"),
        ([("[1, 2]", "[3, 4]")], None),
    ],
)
def test_a_second_draw_has_the_same_rule_and_other_seeds(shelf, tmp_path, changes, fault):
    first = shelf()
    (tmp_path / "first.yaml").write_text(first.path.read_text())
    again = shelf(*changes, ("study:\n", "study:\n  repeats: first\n"))
    if fault is None:
        return catalogue.check_names(again)
    with pytest.raises(UserError, match=fault):
        catalogue.check_names(again)


def test_a_study_without_a_loss_is_not_verified(shelf):
    recipe = catalogue.FOLDER / "schemes/expert-choice.yaml"
    found = shelf(
        (f"{catalogue.FOLDER}/mixtral.yaml", f"{recipe}\n      look: leak"),
        ("n_experts: 16", "n_experts: 8"),
    )
    planned = catalogue.plan(found.path, found.study)
    assert {one.member for one in planned} == {"dense", "sparse"}
    assert {one.member for one in catalogue._verifiable(found, planned)} == {"dense"}
    leaking = [one for one in planned if one.member == "sparse"]
    with pytest.raises(UserError, match="no run with a loss to compare"):
        catalogue._verifiable(found, leaking)


def results_of(found, **fields):
    found.results.parent.mkdir(exist_ok=True)
    content = {"rule": found.study.rule, "runs": [], "members": {}, **fields}
    found.results.write_text(json.dumps(content))


def test_a_member_must_take_the_best_rate_of_its_class(shelf, tmp_path):
    found = shelf(("sparse:\n", "sparse:\n      tuned_as: top-2\n"))
    planned = catalogue.plan(found.path, found.study)
    with pytest.raises(UserError, match="no results yet; run: make reproduce STUDY=learning-rates"):
        catalogue.check_tuned(found, planned)
    grid = catalogue.find("learning-rates", tmp_path)
    for lost, best in ((0.5, 0.005), (0.01, 0.01)):  # the best, or as near as rounding may move it
        results_of(grid, grid=grid_where(lost, best))
        catalogue.check_tuned(found, planned)
    results_of(grid, grid=grid_where(0.03, 0.01))
    with pytest.raises(UserError, match="optim.lr is 0.005, and 0.01 is best for top-2"):
        catalogue.check_tuned(found, planned)


def grid_where(lost, best):
    """Rates of 0.005 and 0.01, `lost` apart in favour of the best."""
    ce = {f"{rate:g}": 4.0 + (0 if rate == best else lost) for rate in (0.005, 0.01)}
    return {"members": {"top-2": {"best": best, "ce": ce}}}


@pytest.mark.parametrize(
    ("change", "difference", "holds"),
    [
        ({}, 0.0, True),
        ({}, 1e-6, False),  # the same machine and sources: to the bit
        ({"key": "other"}, 1e-6, True),
        ({"key": "other"}, 0.03, False),  # more than the smallest effect claimed
        ({"versions": {"torch": "9"}}, 1e-6, True),
    ],
)
def test_a_run_again_is_equal_to_the_bit_unless_sources_or_machine_differ(
    shelf, change, difference, holds
):
    before = {"key": "k", "ce": 4.0, "machine": "cpu", "torch": "2"}
    after = {"key": "k", "machine": {"cpu": "cpu"}, "versions": {"torch": "2"}, **change}
    outcome = catalogue.compared(shelf(), before, {**after, "ce": 4.0 + difference})
    assert outcome["holds"] is holds and outcome["exact"] is (difference == 0)


def test_results_of_another_rule_are_neither_reported_nor_verified(shelf, tmp_path):
    results_of(shelf())
    changed = shelf(("0.02", "0.5"))
    with pytest.raises(UserError, match="undo the change"):
        catalogue.verify(changed)
    with pytest.raises(UserError, match="undo the change"):
        report.write(tmp_path, tmp_path / "README.md")


@pytest.mark.parametrize(
    ("name", "faulty", "fault"),
    [
        ("rule", 1, "not results of a study"),
        ("runs", {}, "not results of a study"),
        ("members", None, "not results of a study"),
        ("tier", "smoke", "of a smoke test"),
        ("runs", [1], "damaged"),
        ("runs", [{"member": "dense", "seed": 1}], "damaged"),
        ("comparisons", [], "do not follow"),
        ("curves", None, "damaged"),
        ("comparisons", [{"verdict": "reproduced"}], "do not follow"),
    ],
)
def test_damaged_results_are_one_line_and_change_nothing(shelf, tmp_path, name, faulty, fault):
    found = shelf()
    runs = [
        {"member": member, "seed": seed, "ce": 4.0 + seed}
        for member in ("dense", "sparse")
        for seed in (1, 2)
    ]
    judged = report.results.judged(found.study, runs, {})
    results_of(found, runs=runs, **judged)
    assert [one.found.name for one in report.finished(tmp_path)] == ["study"]
    results_of(found, **{**judged, "runs": runs, name: faulty})
    before = found.results.read_text()
    with pytest.raises(UserError, match=fault) as raised:
        report.write(tmp_path, tmp_path / "README.md")
    assert str(found.results) in str(raised.value) and "\n" not in str(raised.value)
    assert found.results.read_text() == before
    assert [path.name for path in found.results.parent.iterdir()] == ["study.json"]


def test_grids_run_first():
    names = [one.name for one in catalogue.in_running_order(catalogue.everything())]
    assert names[0] == "learning-rates" and names[1] == "sparse-vs-dense"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["run", "sparse-vs-dens"], "did you mean sparse-vs-dense?"),
        (["run", "--workers", "0"], "at least 1"),
        (["run", "--tier", "smok"], "invalid choice"),
        (["report", "ladder"], "name none"),
        (["run", "--seed", "1"], "drop --seed"),
        (["collect", "--workers", "1"], "drop it"),
        (["run", "--tier", "smoke", "--workers", "1"], "drop it"),
        (["verify", "ladder", "--tier", "smoke"], "drop --tier"),
    ],
)
def test_the_verb_refuses_in_one_line(capsys, arguments, fault):
    assert main(["study", *arguments]) == 2
    said = capsys.readouterr().err
    assert fault in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_finished_study_is_verified_by_training_one_run_again(
    shelf, small, tmp_path, monkeypatch
):
    found = shelf()
    monkeypatch.setattr(catalogue, "FULL", {**catalogue.FULL, **small})
    monkeypatch.chdir(tmp_path)
    assert catalogue.run(found, workers=2).failed == {}
    outcome = catalogue.verify(found, seed=0)
    assert outcome["exact"] and outcome["holds"] and outcome["same_sources"]
    assert list((catalogue.engine.ROOT / "verify").iterdir()) == []

    stored = json.loads(found.results.read_text())
    again = catalogue.collect(found)
    assert {k: v for k, v in again.items() if k != "created"} == {
        k: v for k, v in stored.items() if k != "created"
    }

    content = json.loads(found.results.read_text())
    member, seed = outcome["run"].split(", seed ")
    (run,) = [r for r in content["runs"] if (r["member"], r["seed"]) == (member, int(seed))]
    run["key"] = "of other sources"
    found.results.write_text(json.dumps(content))
    outcome = catalogue.verify(found, seed=0)
    assert outcome["holds"] and not outcome["same_sources"]
    with pytest.raises(UserError, match="its run of other sources is not in"):
        catalogue.collect(found)
    run["ce"] += 1
    found.results.write_text(json.dumps(content))
    assert not catalogue.verify(found, seed=0)["holds"]
    run["corpus"] = "another text"
    found.results.write_text(json.dumps(content))
    with pytest.raises(UserError, match="text changed since; run: make reproduce STUDY=study"):
        catalogue.verify(found, seed=0)
