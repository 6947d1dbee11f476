"""What the README says exists, exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nano_moe.cli.main import VERBS
from nano_moe.config import ModelConfig, MoEConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAPS = (ROOT / "tests" / "test_traps.py").read_text(encoding="utf-8")
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


def test_the_table_of_schemes_names_fields_files_and_tests_that_exist():
    table = README.split("## Schemes")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    fields = ModelConfig.model_fields.keys() | MoEConfig.model_fields.keys()
    for scheme, named, _, code, tests, _ in rows[1:]:
        for field in re.findall(r"`(\w+)", named):
            assert field in fields, f"{scheme}: {field}"
        for folder, cell in (("nano_moe/model", code), ("tests", tests)):
            for path in re.findall(r"`([\w/]+\.py)`", cell):
                assert (ROOT / folder / path).is_file(), f"{scheme}: {path}"
        for trap in re.findall(r"\bT(\d+)", tests):
            assert f"def test_t{int(trap):02d}_" in TRAPS, f"{scheme}: T{trap}"
