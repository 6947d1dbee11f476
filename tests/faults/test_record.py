"""The table of tests/README.md is the record, and nothing in it was written by hand."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from kit import BEGIN, END, HERE, RECORD, TABLE, table
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


def test_the_soak_starts():
    command = ["make", "--dry-run", "--silent", "-o", ".venv/.installed", "soak", "MINUTES=1"]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = line.strip().replace(".venv/bin/python", sys.executable) + " --help"
    done = subprocess.run(["bash", "-c", ours], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr
