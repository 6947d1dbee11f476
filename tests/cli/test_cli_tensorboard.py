"""`tensorboard`: which folders it shows, under which names."""

import os

import pytest

from nano_moe import runs
from nano_moe.cli import tensorboard
from nano_moe.cli.main import main
from nano_moe.runs import Run


@pytest.fixture
def served(monkeypatch):
    """The folder and port that TensorBoard would be started on, and what the folder holds."""
    seen = {}

    def serve(folder, port):
        seen.update(folder=folder, port=port, holds={n: os.readlink(folder / n) for n in links})
        return 0

    links = []
    original = tensorboard._linked

    def linked(chosen, folder):
        found = original(chosen, folder)
        links.extend(os.listdir(found))
        return found

    monkeypatch.setattr(tensorboard, "_serve", serve)
    monkeypatch.setattr(tensorboard, "_linked", linked)
    return seen


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-1", "b-1"):
        (runs.ROOT / name).mkdir(parents=True)
        (runs.ROOT / name / "recipe.yaml").write_text("")
    return tmp_path / runs.ROOT


def test_all_runs_by_default_and_chosen_ones_alone(shelf, served):
    assert main(["tensorboard"]) == 0
    assert served["folder"] == runs.ROOT and served["port"] == 6006
    assert main(["tensorboard", "b-1", "--port", "7000"]) == 0
    assert served["holds"] == {"b-1": str(shelf / "b-1")} and served["port"] == 7000
    assert not served["folder"].exists()


def test_runs_of_a_study_go_by_member_and_seed(shelf, served, monkeypatch):
    chosen = {"16 / 4, seed 1": Run(shelf / "a-1"), "8 / 2, seed 1": Run(shelf / "b-1")}
    monkeypatch.setattr(tensorboard, "_of_study", lambda name: chosen)
    assert main(["tensorboard", "--study", "granularity"]) == 0
    assert served["holds"] == {
        "16 of 4, seed 1": str(shelf / "a-1"), "8 of 2, seed 1": str(shelf / "b-1"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["c-1"], "run 'c-1': no such run; nearest: b-1"),
        (["--study", "laddr"], "did you mean ladder?"),
        (["a-1", "--study", "ladder"], "not both"),
        (["--port", "0"], "from 1 to 65535"),
    ],
)
def test_faults_are_one_line(shelf, served, capsys, arguments, fault):
    assert main(["tensorboard", *arguments]) == 2
    said = capsys.readouterr().err
    assert fault in said and said.count("\n") == 1 and not served
