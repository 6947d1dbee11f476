"""The run folder `checkpoints/<name>/`: create, describe, find.

recipe.yaml     the resolved recipe; re-runs as it is
manifest.json   git commit, versions, device, seed, corpus hash, parameter counts
tokenizer.json  what turns text into this run's tokens
metrics.csv     one row per logged step, beside TensorBoard's event files
last.ckpt       everything needed to go on
previous.ckpt   the last.ckpt before it; what goes on where last.ckpt turns out to be damaged
best.ckpt       the lowest validation loss so far

No other checkpoint is kept, so a run holds three of them at most, and a fourth while one is being
written. Each ends with its checksum; older ones, without, are taken as they are.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nano_moe import recipe_file
from nano_moe.accounting import count
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.files import locked, make_folder, write_text

if TYPE_CHECKING:
    from nano_moe.text.store import Corpus

ROOT = Path("checkpoints")
LAYOUT = ("strategy", "devices", "nodes", "expert_ranks")  # trainer's fields that change no weight
SCHEMA = 1  # of a checkpoint's contents; raised when an older reader would misread it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PACKAGES = ("nano-moe", "torch", "lightning", "numpy", "tiktoken", "rustbpe")


@dataclass(frozen=True)
class Run:
    """A run folder; its files may or may not exist yet."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def last(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def previous(self) -> Path:
        return self.path / "previous.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "best.ckpt"

    @property
    def has_begun(self) -> bool:
        """Whether there is something to go on from."""
        return self.last.is_file() or self.previous.is_file()

    @property
    def is_untrained_import(self) -> bool:
        """Whether it holds imported weights alone, which nothing here has trained yet."""
        return not self.has_begun and self.manifest_file.is_file() and "imported" in self.manifest()

    @property
    def weights(self) -> list[Path]:
        """The checkpoints to take trained weights from, the first choice first."""
        return [path for path in (self.best, self.last, self.previous) if path.is_file()]

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The resolved recipe; where it names a tokenizer's file, it now names the run's copy."""
        recipe = recipe_file.load(self.recipe_file, overrides)
        if recipe.data.tokenizer_file is None or not self.tokenizer_file.is_file():
            return recipe
        data = recipe.data.model_copy(update={"tokenizer_file": str(self.tokenizer_file)})
        return recipe.model_copy(update={"data": data})

    def manifest(self) -> dict[str, Any]:
        content = read_json(self.manifest_file)
        if not isinstance(content.get("corpus", {}), dict):
            raise UserError(f"{self.manifest_file}: corpus: not what training writes; restore it")
        return content


def create(recipe: Recipe, *, stem: str, name: str | None = None, root: Path = ROOT) -> Run:
    """Claim a new folder, atomically, and write the resolved recipe; raises UserError.

    Without a name it is `<stem>-<n>` with the next free number. Nothing is ever overwritten.
    """
    make_folder(root)
    run = Run(_claim_next(root, stem) if name is None else _claim(root, name))
    try:
        write_text(run.recipe_file, recipe_file.dump(recipe))
    except OSError:
        run.path.rmdir()
        raise
    return run


def check_name_is_free(name: str, root: Path = ROOT) -> None:
    """Raises UserError where a run of that name could not be created."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"run name '{name}': use letters, digits, '.', '_' and '-' only, at most 100, "
            "starting with a letter or digit"
        )
    if (root / name).exists():
        raise UserError(
            f"{root / name}: a run of this name exists and is not overwritten; "
            f"choose another name, or go on with it: make resume RUN={name}"
        )


def stem_of(recipe_path: Path) -> str:
    """What unnamed runs of a recipe file are called: its name, or its run's without the number."""
    stem = recipe_path.stem
    if recipe_path.name == "recipe.yaml":
        stem = re.sub(r"-\d+$", "", recipe_path.resolve().parent.name)
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).strip("-._") or "run"


def is_run(path: Path) -> bool:
    return _is_folder(path) and (path / "recipe.yaml").is_file()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as of a name that is too long
        return False


def find(name: str, root: Path = ROOT) -> Run:
    """The run of that name under `root`, or at that path; raises UserError with near names."""
    for path in (root / name, Path(name)) if NAME.fullmatch(name) else (Path(name),):
        if is_run(path):
            return Run(path)
        if _is_folder(path) and path != root:
            raise UserError(f"{path}: not a run folder (it holds no recipe.yaml)")
    names = sorted(p.parent.name for p in root.glob("*/recipe.yaml"))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:5]
    known = f"nearest: {', '.join(close)}" if close else f"{root}{os.sep} holds no run yet"
    raise UserError(f"run '{name}': no such run; {known}")


@contextlib.contextmanager
def training(run: Run) -> Iterator[None]:
    """Raises UserError where another process trains this run."""
    try:
        with locked(run.path / ".lock", wait=False):
            yield
    except BlockingIOError as error:
        raise UserError(
            f"{run.path}: another process is training this run; wait for its end, or stop it first"
        ) from error


def source_of(recipe: Recipe) -> Run | None:
    """The run whose weights the recipe starts from, if it names one; raises UserError."""
    if recipe.model.moe is None or recipe.model.moe.init_from is None:
        return None
    try:
        return find(recipe.model.moe.init_from)
    except UserError as error:
        raise UserError(f"model.moe.init_from: {error}; train the dense run first") from error


def describe(recipe: Recipe, *, corpus: Corpus, device: str) -> dict[str, Any]:
    """The manifest: what made this run, enough to repeat or to doubt it."""
    counted = count(recipe)
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "device": device,
        "seed": recipe.seed,
        "corpus": {
            "sha256": corpus.sha256,
            "path": str(corpus.path),
            "train_tokens": len(corpus.train),
        },
        "parameters": {
            "total": counted.total_params,
            "active": counted.active_params,
            "embedding": counted.embedding_params,
            "router": counted.router_params,
        },
        "train_flops_per_token": counted.train_flops_per_token,
    }


def check_corpus(run: Run, corpus: Corpus) -> None:
    """Raises UserError where the text or the vocabulary is not what the run was trained on."""
    trained_on = run.manifest().get("corpus", {}).get("sha256")
    if trained_on != corpus.sha256:
        raise UserError(
            f"{run.manifest_file}: trained on corpus {str(trained_on)[:12]}, but {corpus.path} is "
            f"{corpus.sha256[:12]} now: text or vocabulary differ; restore the files and packages "
            "it was prepared from, or train a new run"
        )


def check_recipe(run: Run, recipe: Recipe, checkpoint: dict[str, Any]) -> None:
    """Raises UserError where the recipe is not the one that the checkpoint was trained with."""
    try:  # fields that came after the checkpoint was written take their defaults
        begun = Recipe.model_validate(checkpoint["nano_moe"]["recipe"])
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{run.last}: its recipe is none of this version; go on with the version that began it"
        ) from error
    # What the file holds is part of the corpus, and a batch is the same on any processes.
    free = {"data": {"tokenizer_file"}, "trainer": set(LAYOUT)}
    changed = first_difference(begun.model_dump(exclude=free), recipe.model_dump(exclude=free))
    if changed is not None:
        imported = run.is_untrained_import
        anew = "import with this recipe" if imported else "train this recipe as a new run"
        raise UserError(
            f"{run.recipe_file}, or an override: {changed} was changed since "
            f"{run.best if imported else run.last} was written; resume goes on exactly as begun "
            f"and takes {', '.join(f'trainer.{field}' for field in LAYOUT)} alone, so undo the "
            f"change, or {anew}"
        )


def resume_command(run: Run, recipe: Recipe) -> str:
    """What goes on with a run on the processes of this recipe, which may not be its own."""
    own, now = run.recipe().trainer, recipe.trainer
    changed = [field for field in LAYOUT if getattr(own, field) != getattr(now, field)]
    overrides = [f"trainer.{field}={json.dumps(getattr(now, field))}" for field in changed]
    return " ".join([f"make resume RUN={run.name}", *overrides]).replace('"', "")


def first_difference(one: Any, other: Any, field: str = "") -> str | None:
    """The first dotted field in which two nested mappings differ; None where they do not."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else field
    for key in dict.fromkeys([*one, *other]):
        dotted = f"{field}.{key}" if field else str(key)
        found = first_difference(one.get(key), other.get(key), dotted)
        if found is not None:
            return found
    return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        raise UserError(f"{path}: missing; this run folder is incomplete") from None
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: not JSON of a run; this run folder is damaged") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, `+dirty` when changed; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = "+dirty" if git("status", "--porcelain", "--", str(here)) else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return None


def _claim(root: Path, name: str) -> Path:
    check_name_is_free(name, root)
    try:
        (root / name).mkdir()
    except FileExistsError:
        check_name_is_free(name, root)
        raise
    return root / name


def _claim_next(root: Path, stem: str) -> Path:
    taken = [re.fullmatch(re.escape(stem) + r"-(\d+)", p.name) for p in root.iterdir()]
    number = max((int(match[1]) for match in taken if match), default=0) + 1
    while True:
        try:
            (root / f"{stem}-{number}").mkdir()
            return root / f"{stem}-{number}"
        except FileExistsError:
            number += 1


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
