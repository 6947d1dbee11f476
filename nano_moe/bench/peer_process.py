"""The parent's end of `peer_worker.py`: starts a side in its interpreter, and asks it for steps."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nano_moe import memory

WORKER = Path(__file__).with_name("peer_worker.py")
PACKAGE = WORKER.parent.parent.parent  # the folder from which nano_moe is imported
PATIENCE = 300.0  # seconds for one answer: no request takes a tenth of that


class PeerFault(Exception):
    """A side that could not start, raised a fault, died or stayed silent; its text is one line."""

    def __init__(self, side: str, text: str):
        super().__init__(text)
        self.side = side


class Peer:
    """A decoder in a process of its own, idle between requests.

    Starting returns at once; `wait` is where a side that cannot start says so.
    """

    def __init__(self, side: str, python: str, job: Mapping[str, Any], worker: Path = WORKER):
        self.side = side
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [python, str(worker), json.dumps({"side": side, **job})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=_environment(side),
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process; a second time it does nothing."""
        if not self.errors.closed:
            self.process.kill()
            self.process.communicate()
            self.errors.close()

    def wait(self) -> dict[str, Any]:
        """What the side says of itself once it is built; raises PeerFault."""
        return self._answer()

    def use(self, precision: str, choices: Mapping[str, str]) -> None:
        """Take the next steps so; raises PeerFault."""
        self._ask({"use": {"precision": precision, **choices}})

    def steps(self, n: int) -> list[float]:
        """The seconds of each of n further steps, by the side's own clock; raises PeerFault."""
        return self._ask({"steps": n})["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise PeerFault(self.side, f"no answer within {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "fault" in answer:
            raise PeerFault(self.side, answer["fault"])
        return answer

    def _died(self) -> PeerFault:
        status = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").split("\n")
        last = next((": " + line.strip() for line in reversed(said) if line.strip()), "")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return PeerFault(self.side, f"its process {how}{last}")


def _environment(side: str) -> dict[str, str]:
    """This one's, with freed memory kept on every side, and no module of ours in another's way."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONSAFEPATH"] = "1"  # else files beside the worker would hide modules
    # What keep_freed_memory asks of glibc, for a process that cannot import it.
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(memory.LARGEST)}
    if side == "ours":
        environment["PYTHONPATH"] = str(PACKAGE)
    return environment
