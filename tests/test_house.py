"""The house's rules that a reader relies on: who may import whom, and how long a function is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nano_moe"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Which rooms a room may import from, besides itself, config, errors and files.
KNOWS = {
    "model": set(),
    "accounting": set(),
    "published": {"accounting"},
    "census": {"accounting", "model", "published"},
    "recipe_file": {"published"},
    "footprint": {"accounting"},
    "device": {"accounting"},
    "memory": set(),
    "text": set(),
    "runs": {"accounting", "recipe_file", "model", "text"},
    "comparison": {"runs"},
    "evaluation": {"model", "text"},
    "specialization": {"evaluation", "model"},
    "inference": {"model", "runs", "text"},
    "tasks": {"model", "text"},
    "export": {"accounting", "model", "recipe_file", "runs", "text"},
    "explorer": {
        *("accounting", "evaluation", "inference", "model", "published", "recipe_file", "runs"),
        "specialization",
        "text",
    },
    "training": {
        *("accounting", "device", "evaluation", "footprint", "memory", "model", "runs", "text")
    },
}
GROUND = {"config", "errors", "files", "launch", "ranks"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may_know(path):
    here, found = room(path), imports(path)
    if here != "training":
        assert not any(name.split(".")[0] == "lightning" for name in found)
    if here != "export" and path.name != "peer_worker.py":
        assert not any(name.split(".")[0] == "transformers" for name in found)
    rooms = {name.split(".")[1] for name in found if name.startswith("nano_moe.")}
    if here in KNOWS:
        assert rooms - {here} - GROUND <= KNOWS[here]
    elif here in GROUND:
        assert rooms - {here} <= GROUND


def test_the_command_line_has_no_tensors():
    for path in (PACKAGE / "cli").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path.name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_function_is_over_sixty_lines(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
