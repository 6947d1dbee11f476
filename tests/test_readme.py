"""What the README says exists, exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nano_moe.cli.main import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = [line for block in README.split("```")[1::2] for line in block.splitlines()]


def test_every_make_target_it_names_exists():
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", README))
    assert {"train", "test", "setup", "tensorboard"} <= named
    assert named <= TARGETS


def test_every_verb_is_in_it():
    for verb in VERBS:
        assert f"`{verb}" in README or f"nano_moe {verb}" in README, verb


def test_every_path_it_names_exists():
    named = re.findall(r"\b(?:recipes|tests|nano_moe|data)/[\w./-]*\w", README)
    assert len(named) > 20
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.match(r"make (count|show) ", c)])
def test_commands_that_only_read_a_recipe_run(line):
    arguments = line.split("#")[0].split()[1:]
    done = subprocess.run(
        ["make", "--dry-run", "--silent", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_file_tree_lists_every_room():
    rooms = [p.name for p in (ROOT / "nano_moe").iterdir() if not p.name.startswith("__")]
    for room in rooms:
        assert room in README, f"{room} is not in the README's tree"
