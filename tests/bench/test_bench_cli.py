"""The verb `bench`: JSON that is valid, a file that is whole, faults that are one line."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from nano_moe.bench.report import Report
from nano_moe.cli.bench import BENCHMARKS, cell
from nano_moe.cli.main import main

SECONDS = {"layer", "optimizer", "data"}  # the others start processes, which takes longer


@pytest.fixture
def verb(tmp_path, monkeypatch, capsys):
    """verb(*arguments) -> (status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*arguments):
        status = main(["bench", *arguments])
        return status, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def fault(verb):
    """fault(*arguments) -> the line of a call that is refused before it touches any file."""

    def run(*arguments):
        before = sorted(Path().rglob("*"))
        status, out, err = verb(*arguments)
        assert status == 2 and out == "" and sorted(Path().rglob("*")) == before
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def instant(monkeypatch):
    """A benchmark that takes no time."""
    report = Report("Nothing", [{"case": "a", "ms": 1.5}, {"other": 2}], ("a note",))
    monkeypatch.setattr("nano_moe.bench.layer.layer", lambda quick: report)


@pytest.mark.parametrize(
    "name", [n if n in SECONDS else pytest.param(n, marks=pytest.mark.slow) for n in BENCHMARKS]
)
def test_a_quick_run_prints_and_writes_the_same_json(verb, name):
    if importlib.util.find_spec(f"nano_moe.bench.{name}") is None:
        pytest.skip(f"bench {name} is not part of this build")
    status, out, err = verb(name, "--quick", "--json", "--threads", "1")
    assert status == 0
    printed = json.loads(out, parse_constant=pytest.fail)
    path = Path(f"checkpoints/bench/{name}-quick.json")
    assert json.loads(path.read_text()) == printed and f"written to {path}" in err
    assert printed["nano_moe_bench"] == name and printed["quick"] is True
    assert printed["machine"]["threads"] == 1 and printed["rows"] and printed["notes"]


def test_tables_are_split_where_the_columns_change(verb, instant):
    status, out, _ = verb("layer")
    assert status == 0
    assert out.count("Nothing") == 2 and "1.5" in out and "a note" in out and "torch" in out
    assert Path("checkpoints/bench/layer.json").is_file()


def test_an_earlier_result_is_replaced_and_nothing_else(verb, fault, instant):
    for _ in range(2):
        assert verb("layer", "--out", "mine.json")[0] == 0
    Path("notes.json").write_text('{"a": 1}')
    assert "notes.json" in fault("layer", "--out", "notes.json")
    Path("folder").mkdir()
    assert "folder" in fault("layer", "--out", "folder")
    Path("text").write_text("no JSON")
    assert "text" in fault("layer", "--out", "text")
    assert "text" in fault("layer", "--out", "text/inside.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(fault):
    Path("locked").mkdir(mode=0o500)
    assert "locked" in fault("layer", "--out", "locked/x.json")


def test_arguments_that_mean_nothing(fault):
    assert "layers" in fault("layers")
    assert "--threads 0" in fault("layer", "--threads", "0")
    assert "--threads 100000" in fault("layer", "--threads", "100000")
    assert "--threads" in fault("layer", "--threads", "many")
    assert "NAME" in fault()
    assert "--litgpt-python" in fault("layer", "--litgpt-python", "python3")
    assert "no such program" in fault("peers", "--litgpt-python", "no/python")


def test_cells():
    assert cell(None) == "" and cell(True) == "yes" and cell(12345) == "12,345"
    assert cell(1.03456) == "1.035" and cell("a") == "a"
    assert cell((1.0, 1.5044, 2.25)) == "1.5 (1–2.25)"
    assert cell((999.4, 1234.5, 12345.0)) == "1,234 (999–12,345)"


def test_a_figure_lies_beside_its_result_and_replaces_no_file_of_others(
    verb, fault, tmp_path, monkeypatch
):
    from nano_moe.bench import offload

    drawn = Report("made up", [{"a": 1}], figure=b"a figure")
    monkeypatch.setattr(offload, "offload", lambda *_, **__: drawn)
    assert "would replace mine.png" in fault("offload", "--out", "mine.png")
    (tmp_path / "mine.png").write_bytes(b"a holiday")
    assert "would replace mine.png" in fault("offload", "--out", "mine.json")
    for _ in range(2):  # our own may be replaced
        status, _, err = verb("offload", "--out", "ours.json")
        assert status == 0 and "drawn in ours.png" in err
        assert (tmp_path / "ours.png").read_bytes() == drawn.figure
    assert (tmp_path / "mine.png").read_bytes() == b"a holiday"
