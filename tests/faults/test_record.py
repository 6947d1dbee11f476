"""The table of tests/README.md is the record, and nothing in it was written by hand."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import kit
import pytest
import soak
from kit import BEGIN, END, HERE, RECORD, TABLE, Ledger, table
from making import no_make
from test_kills import KILLS
from test_stops import STOPS

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_record():
    text = TABLE.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(json.loads(RECORD.read_text())).strip()


def attempted() -> set[str]:
    """What the tests here call `ledger.attempt` with: words, or one of a dictionary's."""
    names = {*KILLS.values(), *STOPS}
    for path in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func) == "ledger.attempt":
                continue
            if isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
            else:
                assert ast.unparse(node.args[0]) in ("KILLS[place]", "stop"), path.name
    return names


def test_each_fault_that_is_tried_has_its_row_and_each_row_its_fault():
    held = json.loads(RECORD.read_text())
    rows = {fault for fault, row in held.items() if row["command"] == "make test-faults"}
    assert rows == attempted()


def test_all_that_was_tried_survived():
    rows = json.loads(RECORD.read_text())
    assert {fault: row for fault, row in rows.items() if row["survived"] < row["tried"]} == {}


def test_it_was_tried_as_often_as_it_should():
    """50 kills of training, 10,000 cases of fuzzing and a soak of two hours are what we promise."""
    rows = json.loads(RECORD.read_text())
    tried = {fault: row["tried"] for fault, row in rows.items()}
    assert sum(tried[fault] for fault in KILLS.values()) >= 50
    assert sum(n for fault, n in tried.items() if fault.startswith("fuzz:")) >= 10_000
    assert rows["soak, 120 minutes: memory, files, processes, disk"]["command"] == "make soak"
    assert json.loads(soak.FIGURES.read_text())["seconds"] >= 7190  # between two looks


def test_a_row_says_which_commit_was_tried():
    mine = Ledger()
    mine.commit = "0123abc+"
    with mine.attempt("a fault", 3):
        pass
    (row,) = [line for line in table(mine.rows()).splitlines() if line.startswith("| a fault")]
    assert row.startswith("| a fault | 3 | 3 |") and row.endswith("| 0123abc+ |")
    before = {"old": {"tried": 1, "survived": 1, "command": "x", "date": "2026-01-01"}}
    assert table(before).rstrip().endswith("| 2026-01-01 | – |")


def test_the_commit_says_whether_anything_but_the_record_has_changed(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert kit.commit(tmp_path) is None
    (tmp_path / "tests" / "faults").mkdir(parents=True)
    records = [tmp_path / "tests" / name for name in ("README.md", "faults/results.json")]
    for path in (*records, tmp_path / "code.py"):
        path.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--no-verify", "--message=x")
    short = git("rev-parse", "--short", "HEAD")
    assert Ledger().commit == kit.commit() != short
    for path in records:
        path.write_text("2")
    assert kit.commit(tmp_path) == kit.commit(tmp_path / "tests" / "faults") == short
    (tmp_path / "code.py").write_text("2")
    assert kit.commit(tmp_path) == kit.commit(tmp_path / "tests" / "faults") == f"{short}+"


def test_the_soak_of_the_record_has_no_fault():
    found = json.loads(soak.FIGURES.read_text())
    assert soak.faults_of(found) == []
    assert soak.faults_of({**found, "log_bytes_per_step": soak.LOG_BYTES + 1}) != []


@pytest.mark.parametrize(("minutes", "recorded"), [(1, False), (119, False), (120, True)])
def test_a_short_soak_leaves_the_record_as_it_is(monkeypatch, tmp_path, capsys, minutes, recorded):
    found = json.loads(soak.FIGURES.read_text())
    rows = {}
    monkeypatch.setattr(soak, "FIGURES", tmp_path / "soak.json")
    monkeypatch.setattr(soak, "write_record", rows.update)
    monkeypatch.setattr(soak, "soak", lambda folder, seconds: found)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", str(minutes)])
    assert soak.main() == 0
    assert '"log_bytes_per_step"' in capsys.readouterr().out
    assert soak.FIGURES.exists() == bool(rows) == recorded
    for row in rows.values():
        assert row["commit"] == kit.commit()


def test_the_soak_starts():
    command = ["make", "--dry-run", "--silent", "-o", ".venv/.installed", "soak", "MINUTES=1"]
    line = subprocess.check_output(command, cwd=ROOT, env=no_make(), text=True)
    ours = line.strip().replace(".venv/bin/python", sys.executable) + " --help"
    done = subprocess.run(["bash", "-c", ours], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr
