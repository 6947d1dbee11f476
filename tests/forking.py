"""A child that is a copy of the test's process, to be killed or to change what its parent keeps."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any


def fork(work: Callable[[], Any]) -> int:
    """The id of a child that does `work` and ends with status 0, or 99 and a traceback."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()  # pytest shows what a failed test wrote
            os._exit(99)
    return child


def ended(child: int) -> int:
    """A child's exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
