"""The house's rules that a reader relies on: who may import whom, and how long a function is."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nano_moe"
MODULES = sorted(PACKAGE.rglob("*.py"))
GROUND = {"config", "errors", "files", "launch", "ranks"}
ROOMS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
# Which rooms a room may import from, besides itself and GROUND, which knows GROUND alone.
KNOWS = {
    **{ground: set() for ground in ("__init__", *GROUND)},
    "__main__": {"cli"},
    "model": set(),
    "accounting": set(),
    "published": {"accounting"},
    "census": {"accounting", "model", "published"},
    "recipe_file": {"published"},
    "footprint": {"accounting"},
    "device": {"accounting"},
    "memory": set(),
    "plotting": set(),
    "text": set(),
    "runs": {"accounting", "recipe_file", "text"},
    "checkpoints": {"model", "runs"},
    "comparison": {"runs"},
    "break_even": {"comparison", "runs"},
    "communication": {"accounting"},
    "evaluation": {"model", "text"},
    "specialization": {"evaluation", "model"},
    "inference": {"checkpoints", "model", "runs", "text"},
    "tasks": {"model", "text"},
    "export": {"accounting", "checkpoints", "model", "recipe_file", "runs", "text"},
    "explorer": {
        *("accounting", "checkpoints", "evaluation", "inference", "model", "published"),
        *("recipe_file", "runs", "specialization", "text"),
    },
    "training": {
        *("accounting", "checkpoints", "device", "evaluation", "footprint", "memory", "model"),
        *("runs", "text"),
    },
    "bench": ROOMS - {"cli", "studies"},
    "studies": ROOMS - {"cli"},
    "cli": ROOMS,
}


def imports(path: Path) -> set[str]:
    return names(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def names(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full, so that they are seen here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: no function's body, nothing for the type checker."""
    for child in ast.iter_child_nodes(node):
        typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not typing and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from at_import(child)


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


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
    assert rooms - {here} - GROUND <= KNOWS[here]


def test_every_room_has_its_rule():
    assert KNOWS.keys() == ROOMS


def test_imports_form_no_cycle():
    known = {module(path): path for path in MODULES}
    graph = {}
    for name, path in known.items():
        needed = names(at_import(ast.parse(path.read_text(encoding="utf-8"))))
        graph[name] = {n if n in known else n.rpartition(".")[0] for n in needed} & known.keys()
    assert len(graph) > 100 and graph["nano_moe.runs"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("folder", ["cli", "text"])
def test_the_command_line_and_text_have_no_tensors(folder):
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path.name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_function_is_over_sixty_lines(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
