"""Recipe files: YAML with `base:` inheritance and `key=value` overrides, to a frozen `Recipe`.

A file may also hold a published model, which is counted and not trained; its fields say which.

Apart from `config/` because it has another reader: whoever changes what a recipe *says* looks
there, whoever changes how faults are *reported* looks here. Every fault is a `UserError` of one
line: file:line, dotted field, the fault, the remedy.
"""

from __future__ import annotations

import difflib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt
from ruamel.yaml.scalarstring import ScalarString

from nano_moe.config import FieldFault, Recipe
from nano_moe.errors import UserError
from nano_moe.published import Published

MAX_BYTES = 100_000  # a recipe is a page of text, not a data file
MAX_DIGITS = 300  # of a whole number; Python refuses to write out much longer ones
MAX_NAMES = 30  # of files that are there instead
MAX_BASES = 20  # files that one recipe inherits through
MAX_NODES = 10_000  # aliases can make a small file expand without end
MAX_DEPTH = 50  # what is nested deeper takes ruamel the square of its depth to build
LONG = 5_000  # characters from which on a text is looked through for its depth first

PUBLISHED = {"published", "weights"}  # either field makes a file a published model,
RUN = {"seed", "data", "optim", "trainer"}  # and none of these makes it one to count, too

Keys = tuple[str, ...]
Checked = TypeVar("Checked", bound=BaseModel)


class Tree(NamedTuple):
    """Plain nested values, and where each dotted field was written."""

    values: dict[str, Any]
    origins: dict[Keys, str]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, its bases and `key=value` overrides; raises UserError."""
    tree = _read_with(path, overrides)
    if PUBLISHED & set(tree.values):
        raise UserError(
            f"{path}: a published model, for counting only; run: make count RECIPE={path}, "
            "or train a recipe such as recipes/mixtral.yaml"
        )
    return validate(tree, str(path), Recipe)


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Published:
    """As `load`, and of what is only counted: published models, and a `model:` block alone."""
    tree = _read_with(path, overrides)
    if overrides and "weights" in tree.values:
        raise UserError(
            f"{path}: lists weights and has no model block, so there is no field to override; "
            "change a copy of the file"
        )
    if PUBLISHED & set(tree.values) or not RUN & set(tree.values):
        return validate(tree, str(path), Published)
    return validate(tree, str(path), Recipe)


def dump(recipe: Recipe | Published) -> str:
    """The resolved recipe as YAML that is read back to an equal recipe."""
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100
    out = io.StringIO()
    parts = recipe.model_dump(mode="json")
    yaml.dump({name: part for name, part in parts.items() if part is not None}, out)
    return out.getvalue()


def _read_with(path: str | Path, overrides: Sequence[str]) -> Tree:
    tree = read_tree(Path(path))
    for override in overrides:
        tree = merge(tree, parse_override(override))
    return tree


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> Tree:
    """One file merged over its chain of `base:` files."""
    text = _read(path)
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(p.name) for p in (*seen, resolved))
        raise UserError(f"{path}: base: these files inherit in a circle ({chain}); break it")
    if len(seen) > MAX_BASES:
        raise UserError(f"{path}: base: inherits through more than {MAX_BASES} files; shorten it")
    tree = parse(text, str(path))
    base = tree.values.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{tree.origins[('base',)]}: base: must be the name of one file")
    base_path = path.parent / base
    if not _is_file(base_path):
        raise UserError(
            f"{tree.origins[('base',)]}: base: no file {base_path}{_suggest_file(base_path)}"
        )
    return merge(read_tree(base_path, (*seen, resolved)), tree)


def merge(under: Tree, over: Tree) -> Tree:
    """`over` on top of `under`: mappings merge, anything else replaces."""
    values = _merge_values(under.values, over.values)
    return Tree(values, {**under.origins, **over.origins})


def parse_override(text: str) -> Tree:
    """`a.b=value`, the value read as YAML, to a one-leaf tree."""
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"override '{text}': write it as key=value, such as optim.lr=0.01")
    where = f"override {text[:100]}"
    try:
        node = YAML().load(value) if value.strip() else None
    except Exception as error:  # ruamel raises many kinds, for odd tags and numbers above all
        raise UserError(f"{where}: the value is not YAML; quote it") from error
    leaf = _plain(node, where)
    if isinstance(leaf, dict):
        raise UserError(f"{where}: give each field of a block its own override, or null")
    values: Any = leaf
    for part in reversed(keys):
        values = {part: values}
    return Tree(values, {keys[: n + 1]: where for n in range(len(keys))})


def parse(text: str, source: str) -> Tree:
    """One file's text as it stands, without its bases; raises UserError that names `source`."""
    try:
        if len(text) > LONG:
            _check_depth(text, source)
        node = YAML().load(text)
    except UserError:
        raise
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        field = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise UserError(f"{source}:{line}: {field}: written twice; keep one") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{source}:{line}: not YAML ({error.problem}); mend this line") from None
    except Exception as error:  # ruamel raises many kinds, for odd tags and numbers above all
        first = str(error).splitlines()[0] if str(error) else "unreadable"
        raise UserError(f"{source}: not YAML ({first}); mend the file") from None
    if not isinstance(node, CommentedMap):
        raise UserError(f"{source}: holds no fields; write them as in recipes/mixtral.yaml")
    values = _plain(node, source)
    return Tree(values, dict(_origins(node, source, ())))


def _check_depth(text: str, source: str) -> None:
    depth = 0
    for event in YAML().parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1
            raise UserError(f"{source}:{line}: nested more than {MAX_DEPTH} deep; write it flat")


def validate(tree: Tree, source: str, schema: type[Checked]) -> Checked:
    """Check a merged tree against a schema; the first fault becomes one line."""
    try:
        return schema.model_validate(tree.values)
    except ValidationError as error:
        misspelt_first = sorted(error.errors(), key=lambda f: f["type"] != "extra_forbidden")
        faults = [_describe(fault, tree, source, schema) for fault in misspelt_first]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more) from error


# --- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; name a recipe file")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES} bytes; this is not a recipe")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{_suggest_file(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a recipe file") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as of a name that is too long
        return False


def _suggest_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.glob("*.yaml"))
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    more = ", …" if names[MAX_NAMES:] else ""
    return f"; {path.parent}{os.sep} holds {', '.join(names[:MAX_NAMES])}{more}" if names else ""


def _plain(node: Any, source: str) -> Any:
    """ruamel's decorated values as plain Python ones; bounded, since aliases multiply."""
    try:
        return _plain_within(node, source, [MAX_NODES])
    except RecursionError:
        raise UserError(f"{source}: nested without end; write each value out") from None


def _plain_within(node: Any, source: str, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise UserError(f"{source}: expands to more than {MAX_NODES} values; shorten it")
    if isinstance(node, CommentedMap):
        return {str(k): _plain_within(v, source, budget) for k, v in node.items()}
    if isinstance(node, CommentedSeq):
        return [_plain_within(v, source, budget) for v in node]
    if isinstance(node, int) and abs(node) >= 10**MAX_DIGITS:
        raise UserError(f"{source}: holds a number of more than {MAX_DIGITS} digits; shorten it")
    for kind, plain in ((ScalarFloat, float), (ScalarInt, int), (ScalarString, str)):
        if isinstance(node, kind):
            return plain(node)
    return node


def _origins(
    node: CommentedMap | CommentedSeq, source: str, prefix: Keys
) -> Iterator[tuple[Keys, str]]:
    entries = enumerate(node) if isinstance(node, CommentedSeq) else node.items()
    for key, value in entries:
        keys = (*prefix, str(key))
        if key in (node.lc.data or {}):  # keys merged in by << have no line of their own
            yield keys, f"{source}:{node.lc.data[key][0] + 1}"
        if isinstance(value, (CommentedMap, CommentedSeq)):
            yield from _origins(value, source, keys)


def _merge_values(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _merge_values(under[key], value) if key in under else value
    return merged


# --- faults --------------------------------------------------------------------------------------


def _describe(fault: Any, tree: Tree, source: str, schema: type[BaseModel]) -> str:
    keys = tuple(str(part) for part in fault["loc"])
    message, remedy_needed = _message(fault, keys)
    error = fault.get("ctx", {}).get("error")
    if isinstance(error, FieldFault):
        keys = (*keys, *error.field.split("."))
    where = _origin(keys, tree.origins, source)
    hint = _did_you_mean(keys, schema) if remedy_needed else ""
    return f"{where}: {'.'.join(keys)}: {message}{hint}"


def _origin(keys: Keys, origins: dict[Keys, str], source: str) -> str:
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return origins[keys[:length]]
    return source


def _message(fault: Any, keys: Keys) -> tuple[str, bool]:
    """The fault in words, and whether the field's name itself is the fault."""
    kind, given, ctx = fault["type"], fault.get("input"), fault.get("ctx", {})
    if kind == "extra_forbidden":
        return "no such field", True
    if kind == "missing":
        return "missing; this field has no default, so add it", False
    if kind == "value_error":
        return str(ctx["error"]), False
    if kind == "literal_error":
        return f"{_as_yaml(given)} is not one of {ctx['expected']}", False
    if kind == "too_short":
        return f"must have at least {ctx['min_length']} of them, not {len(given)}", False
    wants = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text (quote it if it looks like a number)",
        "tuple_type": "a list",
        "model_type": "a block of fields, not a single value",
        "model_attributes_type": "a block of fields, not a single value",
        "dict_type": "a block of fields, not a single value",
        "finite_number": "a finite number",
    }
    if kind in wants:
        return f"must be {wants[kind]}, not {_as_yaml(given)}", False
    return f"{fault['msg'].removeprefix('Input ')}, not {_as_yaml(given)}", False


def _as_yaml(value: Any) -> str:
    """A value as the user wrote it, more or less, and not too long."""
    return json.dumps(value, default=str)[:80]


def _did_you_mean(keys: Keys, schema: type[BaseModel]) -> str:
    section = _section(keys[:-1], schema)
    names = [] if section is None else list(section.model_fields)
    close = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    elsewhere = [dotted for dotted in _all_fields(schema, ()) if dotted[-1] == keys[-1]]
    if elsewhere:
        return f"; did you mean '{'.'.join(elsewhere[0])}'?"
    return f"; there are {', '.join(names)}" if names else "; remove it"


def _section(keys: Keys, schema: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = schema
    for key in keys:
        if key.isdecimal():  # an entry of a list, whose section is the list's
            continue
        field = model.model_fields.get(key) if model else None
        model = _model_in(field.annotation) if field else None
    return model


def _all_fields(model: type[BaseModel], prefix: Keys) -> Iterator[Keys]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_fields(inner, (*prefix, name))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `MoE | None` or `tuple[Weights, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in inside if section is not None), None)
