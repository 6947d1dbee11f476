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
    for name in ("studdy", "recipes/studies/study.yaml", "../study"):
        with pytest.raises(UserError, match="did you mean study"):
            catalogue.find(name, tmp_path)


def test_a_class_that_the_grid_does_not_know_is_refused_before_any_run(shelf, tmp_path):
    found = shelf(("sparse:\n", "sparse:\n      tuned_as: top-22\n"))
    with pytest.raises(UserError, match="has no 'top-22'; there are dense, dense-total"):
        catalogue.smoke(found, catalogue.Place(tmp_path / "studies", ()))


def results_of(found, **fields):
    found.results.parent.mkdir(exist_ok=True)
    content = {"rule": found.study.rule, "runs": [], **fields}
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
