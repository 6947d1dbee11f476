"""What the fault suite shares: a tiny run whose every state is known, children to kill, mounts.

Forks of this process stand for processes of their own: they start in milliseconds, and a hook that
slows a write or spoils a step lives in the child alone.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from forking import ended, fork
from hypothesis import HealthCheck, settings

from nano_moe import checkpoints, recipe_file, runs
from nano_moe.cli.main import main
from nano_moe.runs import Run
from nano_moe.text.store import prepare
from nano_moe.training.fit import fit

STEPS, SAVE_EVERY = 36, 3
TINY = f"""\
seed: 5
model:
  vocab_size: 264
  context: 16
  n_layers: 2
  d_model: 16
  n_heads: 2
  d_ff: 32
  moe: {{n_experts: 4, top_k: 2, load_balancing_loss: 0.01, noisy_top_k: true}}
data: {{files: [text.txt], tokenizer: byte, val_fraction: 0.2, cache: cache}}
optim: {{lr: 0.01, newton_schulz: fp32}}
trainer:
  steps: {STEPS}
  batch_size: 2
  precision: fp32
  accelerator: cpu
  val_every: 10
  save_every: {SAVE_EVERY}
  log_every: 2
"""
CLOCKS = {"seconds", "row_seconds", "loops"}  # no two runs share them


def write_shop(folder: Path) -> None:
    """text.txt and tiny.yaml."""
    words = "the old fox saw a hen and ran to the river where stones lie in the sun".split()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(20)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(TINY)


# --- verbs and children --------------------------------------------------------------------------


def verb(*arguments: str) -> tuple[int, str, list[str]]:
    """(exit status, stdout, lines of stderr and of warnings) of a verb in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("nano_moe")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(arguments))
    finally:
        logger.removeHandler(handler)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return status, out.getvalue(), err.getvalue().replace("\r", "\n").splitlines()


def refused(*arguments: str) -> str:
    """The one line with which a verb must refuse."""
    status, _, lines = verb(*arguments)
    faults = [line for line in lines if line.startswith("error:")]
    assert status == 2 and len(faults) == 1 and lines[-1] == faults[0], (status, lines)
    return faults[0]


# --- a course that is known ----------------------------------------------------------------------


def state_of(path: Path) -> str:
    """A hash of all that a checkpoint holds but clocks and the trainer's own loop counters."""
    digest = hashlib.sha256()
    _feed(digest, torch.load(path, weights_only=True))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in CLOCKS:
                digest.update(repr(key).encode())
                _feed(digest, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _feed(digest, inner)
    else:
        digest.update(repr(value).encode())


class Remember(L.Callback):
    """Keeps the state after every step, as a checkpoint would hold it."""

    def __init__(self, known: dict[int, str]):
        self.known = known

    def on_train_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self._keep(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self._keep(trainer)

    def _keep(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint("scratch.ckpt")
        self.known[trainer.global_step] = state_of(Path("scratch.ckpt"))


class Course:
    """An uninterrupted training in the working folder, and the state after each of its steps."""

    def __init__(self) -> None:
        self.recipe = recipe_file.load("tiny.yaml")
        self.known: dict[int, str] = {}
        self.whole = runs.create(self.recipe, stem="tiny", name="whole")
        watch = [lambda _: Remember(self.known)]
        fit(self.whole, self.recipe, self.corpus(), progress=False, watchers=watch)

    def corpus(self) -> Any:
        model = self.recipe.model
        return prepare(self.recipe.data, model.vocab_size, model.context, progress=False)

    def begin(self, name: str) -> Run:
        run = runs.create(self.recipe, stem="tiny", name=name)
        fit(run, self.recipe, self.corpus(), progress=False)
        return run

    def go_on(self, run: Run) -> None:
        fit(run, run.recipe(), self.corpus(), resume=True, progress=False)

    def check(self, run: Run) -> int:
        """Assert that the newest whole checkpoint is on course; its step."""
        path, content, _ = checkpoints.newest(run)
        step = int(content["global_step"])
        assert state_of(path) == self.known[step], f"step {step} of {path} is off course"
        return step

    def check_end(self, run: Run) -> None:
        """Assert that a finished run is the uninterrupted one, its rows included."""
        assert self.check(run) == STEPS
        assert state_of(run.best) == state_of(self.whole.best)
        assert rows(run) == rows(self.whole)
        held = {path.name for path in run.path.iterdir() if path.suffix == ".ckpt"}
        assert held == {"last.ckpt", "previous.ckpt", "best.ckpt"}
        assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def rows(run: Run) -> list[dict[str, str]]:
    """metrics.csv without the clock."""
    with open(run.metrics_file, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def copy_of(run: Run, name: str) -> Run:
    return Run(Path(shutil.copytree(run.path, run.path.with_name(name))))


# --- disks ---------------------------------------------------------------------------------------

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18


def _libc(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _libc("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode() or None)


def own_mounts() -> None:
    """From here on this process mounts what it likes; nobody else sees it, and it ends with it."""
    user, group = os.geteuid(), os.getegid()
    _libc("unshare", NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", "/", "", RECURSIVE | PRIVATE)


def mount_small(folder: Path, size: int) -> None:
    """A disk of its own in place of an empty folder, of `size` bytes."""
    _mount("tmpfs", str(folder.absolute()), "tmpfs", 0, f"size={size}")


def resize(folder: Path, size: int) -> None:
    _mount("tmpfs", str(folder.absolute()), "tmpfs", REMOUNT, f"size={size}")


def make_read_only(folder: Path) -> None:
    """As a read-only disk is: root, too, writes nothing there."""
    place = str(folder.absolute())
    _mount(place, place, "", BIND | RECURSIVE)
    _mount("none", place, "", BIND | REMOUNT | READ_ONLY)


def can_mount() -> bool:
    """Whether this system lets a child have mounts of its own."""
    return ended(fork(own_mounts)) == 0


# --- the record ----------------------------------------------------------------------------------

FULL = os.environ.get("NANO_MOE_FAULTS") == "full"
HERE = Path(__file__).parent
RECORD, TABLE = HERE / "results.json", HERE.parent / "README.md"
BEGIN, END = "<!-- faults: written by make test-faults and make soak -->", "<!-- end of faults -->"


def commit(root: Path = HERE) -> str | None:
    """The commit that is tried, "+" where the tree differs from it, the record apart.

    None outside git.
    """
    ours = [f":(top,exclude)tests/{name}" for name in ("README.md", "faults/*.json")]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain", "--", ":/", *ours) else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def times(few: int, many: int) -> int:
    """How often to try a fault: in `make test-all`, and in `make test-faults`."""
    return many if FULL else few


def fuzz(few: int, many: int) -> settings:
    """So many examples, each of which may use the working folder and the ledger.

    The same ones each time in `make test-all`, others each time in `make test-faults`.
    """
    return settings(
        max_examples=times(few, many),
        deadline=None,
        derandomize=not FULL,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class Ledger:
    """Counts, by fault, what was tried and what survived."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.commit = commit()  # of what was imported, whatever is edited meanwhile

    @contextlib.contextmanager
    def attempt(self, fault: str, n: int = 1) -> Iterator[None]:
        """`n` tries, survived unless the block raises."""
        row = self.counts.setdefault(fault, [0, 0])
        row[0] += n
        yield
        row[1] += n

    def rows(self) -> dict[str, dict[str, Any]]:
        return {
            fault: {
                "tried": tried,
                "survived": survived,
                "command": "make test-faults",
                "date": time.strftime("%Y-%m-%d"),
                "commit": self.commit,
            }
            for fault, (tried, survived) in self.counts.items()
        }


def write_record(new: dict[str, dict[str, Any]]) -> None:
    """Put rows into results.json and, from there, the table into tests/README.md."""
    held = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    held |= new
    RECORD.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
    text = TABLE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    TABLE.write_text(f"{before}{BEGIN}\n\n{table(held)}\n{END}{after}", encoding="utf-8")


def table(held: dict[str, dict[str, Any]]) -> str:
    """Rows of before commits were noted have none."""
    header = ("fault", "tried", "survived", "command", "last run", "commit")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for fault, row in sorted(held.items()):
        command, at = f"`{row['command']}`", row.get("commit") or "–"
        facts = (fault, row["tried"], row["survived"], command, row["date"], at)
        lines.append("| " + " | ".join(map(str, facts)) + " |")
    return "\n".join(lines) + "\n"


def wait_for(ready: Callable[[], bool], child: int, seconds: float = 60) -> None:
    """Until something holds; the child is killed where it never does."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("it never came to that")
        time.sleep(0.005)
