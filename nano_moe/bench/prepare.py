"""Preparing made-up text of any size: how fast, and whether memory stays as it is.

Each size is prepared in a process of its own, by the verb `prepare`, from a folder laid out as a
dataset of the hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nano_moe.bench.recipes import FOLDER, random_text
from nano_moe.bench.report import Report, Row
from nano_moe.errors import UserError

MEGABYTES = 200
MOST = 2000  # MB resident at the peak
DOCUMENT, POOL = 2000, 400_000  # characters of one document; words that they are made of

NOTES = (
    "peak: the largest resident set of the preparing process (ru_maxrss), pages of files that it "
    "maps included; it forks none. Seconds hold its start.",
    "text, tokens and a copy of the text lie in the folder for temporary files (TMPDIR).",
)


def prepare(quick: bool, megabytes: int | None = None) -> Report:
    largest = 2 if quick else megabytes or MEGABYTES
    if largest < 1:
        raise UserError(f"--megabytes {largest}: at least 1")
    sizes = sorted({max(1, largest // 10), largest})
    return Report("Preparing a corpus", [_prepared(size) for size in sizes], NOTES)


def _prepared(megabytes: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="nano-moe-bench-") as name:
        folder = Path(name)
        write_text(folder / "made-up" / "train.parquet", megabytes)
        found, seconds, peak = _measured(folder)
    splits = [split for domain in found["domains"].values() for split in domain.values()]
    n_bytes, n_tokens = (sum(split[what] for split in splits) for what in ("bytes", "tokens"))
    return {
        "text MB": round(n_bytes / 1e6),
        "seconds": seconds,
        "MB/s": n_bytes / 1e6 / seconds,
        "tokens/s": round(n_tokens / seconds),
        "peak MB": round(peak / 1e6),
        "target": MOST,
        "met": peak <= MOST * 1e6,
    }


def _measured(folder: Path) -> tuple[dict[str, Any], float, int]:
    """What the verb prints, its seconds, and its largest resident set in bytes."""
    places = {"hub.dataset": folder / "made-up", "cache": folder / "data"}
    overrides = [f"data.{key}={json.dumps(str(path))}" for key, path in places.items()]
    command = [sys.executable, "-m", "nano_moe", "prepare", str(FOLDER / "mixtral.yaml"), "--json"]
    start = time.perf_counter()
    with (folder / "out.json").open("wb") as out:
        process = subprocess.Popen([*command, *overrides], stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"prepare: ended with status {process.returncode}; see above")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads((folder / "out.json").read_bytes()), seconds, used.ru_maxrss * unit


def write_text(path: Path, megabytes: int) -> None:
    """Different documents of made-up words, in one parquet file; a few MB at a time."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    path.parent.mkdir(parents=True)
    schema = pa.schema([("text", pa.string())])
    with ParquetWriter(path, schema) as writer:
        batch: list[str] = []
        for document in _documents(megabytes * 10**6):
            batch.append(document)
            if len(batch) == 1000:
                writer.write_table(pa.table({"text": batch}, schema=schema))
                batch = []
        writer.write_table(pa.table({"text": batch}, schema=schema))


def _documents(n_bytes: int) -> Iterator[str]:
    pool = random_text(POOL)
    number = written = 0
    while written < n_bytes:
        start = number * 7919 % (len(pool) - DOCUMENT)
        document = f"{number}\n{pool[start : start + DOCUMENT]}"
        yield document
        number, written = number + 1, written + len(document)
