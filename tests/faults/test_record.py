"""The table of tests/README.md is the record, and nothing in it was written by hand."""

import json

from kit import BEGIN, END, RECORD, TABLE, table


def test_the_table_is_the_record():
    text = TABLE.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(json.loads(RECORD.read_text())).strip()


def test_all_that_was_tried_survived():
    rows = json.loads(RECORD.read_text())
    assert {fault: row for fault, row in rows.items() if row["survived"] < row["tried"]} == {}
