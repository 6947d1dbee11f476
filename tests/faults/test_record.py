"""The table of tests/README.md is the record, and nothing in it was written by hand."""

import json
import subprocess
import sys
from pathlib import Path

from kit import BEGIN, END, RECORD, TABLE, table

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_record():
    text = TABLE.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(json.loads(RECORD.read_text())).strip()


def test_all_that_was_tried_survived():
    rows = json.loads(RECORD.read_text())
    assert {fault: row for fault, row in rows.items() if row["survived"] < row["tried"]} == {}


def test_the_soak_starts():
    command = ["make", "--dry-run", "--silent", "-o", ".venv/.installed", "soak", "MINUTES=1"]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = line.strip().replace(".venv/bin/python", sys.executable) + " --help"
    done = subprocess.run(["bash", "-c", ours], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr
