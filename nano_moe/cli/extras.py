"""Packages that only some verbs need."""

from __future__ import annotations

import importlib.util

from nano_moe.errors import UserError


def need(extra: str, *packages: str) -> None:
    """Raises UserError, with the command that installs them, where a package is not there."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"needs {' and '.join(missing)}; install with: .venv/bin/python -m pip install "
            f"--editable '.[{extra}]'"
        )
