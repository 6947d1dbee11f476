"""Hours of training with evaluation and checkpoints every few steps, watched from outside.

`make soak`, or `make soak MINUTES=2` to try it. A real `train` in a process of
its own; its memory, files, threads, children and folder are read every few seconds. It fails where
memory grows by more than 2 % after the warm-up, where a descriptor, thread or process is left over,
where checkpoints take more room than the retention rule of nano_moe/runs.py allows, and where logs,
which nothing removes, take more than LOG_BYTES for each step. Figures of two hours or more go to
tests/faults/soak.json and into the table of tests/README.md; those of less are printed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kit import HERE, commit, write_record, write_shop

FIGURES = HERE / "soak.json"
RECORDED = 120  # minutes, from which on a soak is one for the record
GROWTH = 0.02
LOG_BYTES = 1200  # of metrics.csv and events per step, by these intervals: 991 in two hours
OVERRIDES = (
    "trainer.steps=100000000",
    "trainer.val_every=10",
    "trainer.save_every=5",
    "trainer.log_every=50",
    "trainer.batch_size=8",
    "model.d_model=64",
    "model.d_ff=128",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    minutes, tried = parser.parse_args().minutes, commit()
    with tempfile.TemporaryDirectory() as folder:
        write_shop(Path(folder))
        found = soak(Path(folder), minutes * 60)
    faults = faults_of(found)
    if minutes >= RECORDED:
        record(minutes, found, faults, tried)
    print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=1))
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "no fault")
    return 1 if faults else 0


def record(minutes: float, found: dict, faults: list[str], tried: str | None) -> None:
    """Into soak.json and the table."""
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    row = {
        "tried": 1,
        "survived": int(not faults),
        "command": "make soak" if minutes == RECORDED else f"make soak MINUTES={minutes:g}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": tried,
    }
    write_record({f"soak, {minutes:g} minutes: memory, files, processes, disk": row})


def soak(folder: Path, seconds: float) -> dict:
    """Train for so long, stop by SIGTERM; what was seen."""
    command = [sys.executable, "-m", "nano_moe", "train", "tiny.yaml", "--name", "soak"]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [*command, *OVERRIDES], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    run, samples = folder / "checkpoints" / "soak", []
    try:
        while not (run / "previous.ckpt").exists():
            time.sleep(0.2)
            if process.poll() is not None:
                raise SystemExit((folder / "log.txt").read_text())
        begun = time.monotonic()
        while (now := time.monotonic() - begun) < seconds:
            samples.append({"seconds": round(now, 1), **look(process.pid, run)})
            time.sleep(max(1.0, seconds / 1000))
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    finally:
        process.kill()
    return summary(samples, status, (folder / "log.txt").read_text(), run)


def look(pid: int, run: Path) -> dict[str, int]:
    """What a process holds now, and what its run takes on disk."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    sizes = {path.name: path.stat().st_size for path in run.iterdir() if exists(path)}
    checkpoints = {name: size for name, size in sizes.items() if ".ckpt" in name}
    return {
        "resident": int(lines["VmRSS"].split()[0]) * 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(lines["Threads"]),
        "children": len(children),
        "checkpoints": len(checkpoints),
        "checkpoint_bytes": sum(checkpoints.values()),
        "log_bytes": sum(sizes.values()) - sum(checkpoints.values()),
    }


def exists(path: Path) -> bool:
    """A temporary file may be gone by now."""
    try:
        return path.stat().st_size >= 0
    except FileNotFoundError:
        return False


def summary(samples: list[dict], status: int, log: str, run: Path) -> dict:
    """Early is the second tenth of the samples, late the last tenth; the first is the warm-up."""
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    resident = [statistics.median(s["resident"] for s in part) for part in (early, late)]
    last = next(line for line in reversed(log.splitlines()) if line.startswith("stopped at step"))
    steps = int(last.split()[3])
    one = max(path.stat().st_size for path in run.glob("*.ckpt"))
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "seconds": samples[-1]["seconds"],
        "steps": steps,
        "checkpoints_written": steps // 5,
        "exit_status": status,
        "resident_early": int(resident[0]),
        "resident_late": int(resident[1]),
        "resident_growth": round(resident[1] / resident[0] - 1, 5),
        **{
            f"{name}_{when}": max(s[name] for s in part)
            for name in ("files", "threads", "children")
            for when, part in (("early", early), ("late", late))
        },
        "checkpoints_most": max(s["checkpoints"] for s in samples),
        "checkpoint_bytes_most": max(s["checkpoint_bytes"] for s in samples),
        "checkpoint_bytes_one": one,
        "log_bytes_per_step": round(samples[-1]["log_bytes"] / steps, 1),
        "samples": samples[:: max(1, len(samples) // 60)],
    }


def faults_of(found: dict) -> list[str]:
    """What must not be, in words."""
    faults = []
    if found["exit_status"] != 128 + signal.SIGTERM:
        faults.append(f"it ended with status {found['exit_status']}")
    if found["resident_growth"] > GROWTH:
        faults.append(f"resident memory grew by {found['resident_growth']:.1%}")
    for name in ("files", "threads", "children"):
        if found[f"{name}_late"] > found[f"{name}_early"]:
            faults.append(f"{name}: {found[f'{name}_late']} after {found[f'{name}_early']}")
    if found["checkpoints_most"] > 4:
        faults.append(f"{found['checkpoints_most']} checkpoints at once")
    if found["checkpoint_bytes_most"] > 4 * found["checkpoint_bytes_one"]:
        faults.append(f"checkpoints took {found['checkpoint_bytes_most']:,} bytes")
    if found["log_bytes_per_step"] > LOG_BYTES:
        faults.append(f"logs took {found['log_bytes_per_step']:,} bytes a step")
    return faults


if __name__ == "__main__":
    sys.exit(main())
