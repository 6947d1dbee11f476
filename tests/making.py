"""The environment for a `make` of a test's own, where the tests themselves may run under one."""

from __future__ import annotations

import os


def no_make() -> dict[str, str]:
    """This process's, without what an outer make hands on: its flags and variables."""
    given = os.environ.get("MAKEOVERRIDES", "") + os.environ.get("MAKEFLAGS", "")
    names = {word.partition("=")[0] for word in given.split() if "=" in word}
    ours = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", *names}
    return {name: value for name, value in os.environ.items() if name not in ours}
