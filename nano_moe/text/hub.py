"""Datasets of the Hugging Face hub, or folders laid out like one, read row by row.

Nothing is downloaded as a whole: rows come as a stream in the dataset's own order, and a stream
can be left and gone on with where it stood. Every row is a document, or, where `document_start`
is given, a row that matches it begins one, to which all rows up to the next such row belong.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nano_moe.config import HubConfig
from nano_moe.errors import UserError
from nano_moe.text.split import Document

PATIENCE = 10  # seconds to wait for the hub's first answer
TRIES = 3  # reads, 5 seconds apart, before a lost connection is believed
DATA = {".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt", ".gz", ".zst", ".md", ".yaml"}


class Found(NamedTuple):
    """A dataset and what its text depends on; `folder` is None where the hub has it."""

    hub: HubConfig
    folder: Path | None
    identity: str

    @property
    def name(self) -> str:
        """Its last part: the domain of its documents."""
        return Path(self.hub.dataset).name if self.folder is None else self.folder.name


def found(hub: HubConfig) -> Found:
    """Locate the dataset without the network; a folder's content is read for its hash.

    Raises UserError for a folder without data.
    """
    what = f"{hub.config or 'default'} {hub.split} {hub.column} {hub.document_start or '-'}"
    taken = f"{what} {hub.take_bytes or 'all'}"
    folder = Path(os.path.expanduser(hub.dataset)).resolve()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub.dataset):
            raise UserError(
                f"data.hub.dataset: {hub.dataset} is neither a folder here nor a name as the hub "
                "has them (owner/name); correct it"
            )
        return Found(hub, None, f"hub {hub.dataset} {hub.revision} {taken}")
    return Found(hub, folder, f"folder {folder.name} {_content(folder)} {taken}")


def _content(folder: Path) -> str:
    """A sha256 of the names and contents of a dataset's files."""
    digest, empty = hashlib.sha256(), True
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if hidden or path.suffix not in DATA or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        digest.update(f"{'/'.join(parts)} {content}\n".encode("utf-8", "surrogatepass"))
        empty = empty and path.suffix in (".md", ".yaml")
    if empty:
        raise UserError(
            f"data.hub.dataset: folder {folder} holds no data (.parquet, .arrow, .jsonl, ...); "
            "name a dataset's folder, or text of your own with data.files=PATH"
        )
    return digest.hexdigest()


def _fault_of_a_file(folder: Path, error: Exception) -> str | None:
    """What is wrong with the first parquet file that cannot be read; the library names none.

    Only an error in reading is worth reading all of them again.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile, read_metadata

    paths = sorted(folder.rglob("*.parquet"))
    for path in paths:
        try:
            n_rows = read_metadata(path).num_rows
        except (ArrowException, OSError) as fault:
            return f"{path}: not a readable parquet file ({_first_line(fault)}); fetch it again"
        if n_rows == 0:
            return f"{path}: holds no rows; take it out of the folder"
    for path in paths if isinstance(error, ArrowException | OSError) else ():
        try:
            with ParquetFile(path) as file:
                for _ in file.iter_batches():
                    pass
        except (ArrowException, OSError) as fault:
            return f"{path}: damaged ({_first_line(fault)}); fetch it again"
    return None


class Stream:
    """The documents from where `state` left off, the last ones short of `take_bytes`.

    Raises UserError for a dataset that is not there or not as the recipe says, a hub that cannot
    be reached and a connection that is lost.
    """

    def __init__(self, found: Found, state: dict[str, Any] | None = None):
        self.found = found
        state = state or {"commit": None, "rows": None, "n_rows": 0, "n_bytes": 0, "begun": None}
        self._commit, self._n_rows = state["commit"], state["n_rows"]
        self._n_bytes, self._begun = state["n_bytes"], state["begun"]
        if found.folder is None:
            self._commit = _commit(found.hub, self._commit or found.hub.revision)
        with self._faults():
            self._rows = self._open()
            if state["rows"] is not None:
                self._rows.load_state_dict(state["rows"])

    @property
    def state(self) -> dict[str, Any]:
        """Plain values to go on from after the document given last."""
        return {
            "commit": self._commit,
            "rows": self._rows.state_dict(),
            "n_rows": self._n_rows,
            "n_bytes": self._n_bytes,
            "begun": self._begun,
        }

    def __iter__(self) -> Iterator[Document]:
        with self._faults():
            for name, text in self._documents():
                document = Document(name, self.found.name, text)
                self._n_bytes += document.n_bytes
                if self._n_bytes > (self.found.hub.take_bytes or self._n_bytes):
                    return
                yield document

    def _documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of what is not empty; a document is named by its first row's number."""
        start = self.found.hub.document_start
        begins = re.compile(start) if start else None
        for row in self._rows:
            self._n_rows += 1
            text = row[self.found.hub.column]
            if not isinstance(text, str):
                raise UserError(f"{self._where}: row {self._n_rows}: not a string; drop the row")
            if begins is None:
                if text:
                    yield self._name(self._n_rows), text
            elif begins.search(text) or self._begun is None:
                ended, self._begun = self._begun, [self._n_rows, [text]]
                yield from self._joined(ended)
            else:
                self._begun[1].append(text)
        ended, self._begun = self._begun, None
        yield from self._joined(ended)

    def _joined(self, begun: list[Any] | None) -> Iterator[tuple[str, str]]:
        if begun is not None and (text := "".join(begun[1])).strip():
            yield self._name(begun[0]), text

    def _name(self, row: int) -> str:
        return f"{self.found.name}:{row}"

    @property
    def _where(self) -> str:
        hub = self.found.hub
        return f"data.hub: {hub.dataset}, split {hub.split}"

    def _open(self) -> Any:
        """The dataset's rows with their text alone."""
        from datasets import load_dataset

        hub, folder = self.found.hub, self.found.folder
        which = {"path": hub.dataset, "name": hub.config}
        if folder is not None:
            which = _part(folder, hub.config)
        rows = load_dataset(**which, split=hub.split, revision=self._commit, streaming=True)
        columns = list(rows.features or next(iter(rows), {}))
        if hub.column not in columns:
            raise UserError(
                f"{self._where}: no column '{hub.column}' among {', '.join(columns)}; set "
                "data.hub.column"
            )
        # By row group, where there are any: of whole files the library reads a gigabyte ahead.
        return rows.reshard().select_columns([hub.column])

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what the library raises, which is of many kinds, into one line."""
        with _impatient():
            try:
                yield
            except (UserError, GeneratorExit):
                raise
            except Exception as error:
                reason = _first_line(error)
                if self.found.folder is None and _is_network(error):
                    raise _unreachable(self.found.hub, reason) from error
                folder = self.found.folder
                fault = None if folder is None else _fault_of_a_file(folder, error)
                if fault is not None:
                    raise UserError(fault) from error
                hint = "check dataset, config, split and column under data.hub"
                if self.found.folder is not None and self.found.hub.config is not None:
                    hint += "; a folder of one configuration alone: data.hub.config=null"
                raise UserError(f"{self._where}: cannot be read ({reason}); {hint}") from error


def _part(folder: Path, config: str | None) -> dict[str, Any]:
    """What to load of a folder: where a configuration is named, its own files and no others.

    The library would look for those of the card's first one, too, which a copy of a part lacks. A
    folder whose card does not tell has them in a folder of that name, or with "/" for a "-" of it.
    """
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if config is None:
        return {"path": str(folder)}
    card = folder / "README.md"
    content = DatasetCard.load(card).data if card.is_file() else {}
    told = MetadataConfigs.from_dataset_card_data(content).get(config, {})
    if "data_files" in told:
        files = sanitize_patterns(told["data_files"])
        return {"path": str(folder), "name": config, "data_files": files}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and "-".join(path.relative_to(folder).parts) == config:
            return {"path": str(path)}
    return {"path": str(folder), "name": config}


def _commit(hub: HubConfig, revision: str) -> str | None:
    """The commit that a revision stands for now; the first word with the hub, and a short one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        about = HfApi().dataset_info(hub.dataset, revision=revision, timeout=PATIENCE)
    except RevisionNotFoundError as error:
        raise UserError(
            f"data.hub.revision: {hub.dataset} has no revision {revision}; correct it"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"data.hub.dataset: the hub has no {hub.dataset}, or not for you; correct the name, or "
            "log in with: hf auth login"
        ) from error
    except Exception as error:  # of httpx and the hub's own, by ways of going wrong
        raise _unreachable(hub, _first_line(error)) from error
    return about.sha


def _unreachable(hub: HubConfig, reason: str) -> UserError:
    return UserError(
        f"data.hub.dataset: {hub.dataset}: the Hugging Face hub cannot be reached ({reason}); "
        "connect and run the same again, which goes on where it stood, or set data.hub.dataset to "
        "a folder with a copy of it, or of what of it is read"
    )


def _is_network(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    kinds = {kind.__name__ for kind in type(error).__mro__}
    offline = {"TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ClientError"}
    return isinstance(error, ConnectionError | TimeoutError | HfHubHTTPError) or bool(
        kinds & offline
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


@contextmanager
def _impatient() -> Iterator[None]:
    """The library tries 20 times to reach a hub that is gone; TRIES must do.

    And what it logs of a fault before it raises it is said once, by us.
    """
    import datasets.config

    log = logging.getLogger("datasets")
    level = log.level
    names = ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES")
    before = {name: getattr(datasets.config, name) for name in names}
    try:
        for name in names:
            setattr(datasets.config, name, TRIES)
        log.setLevel(logging.CRITICAL)
        yield
    finally:
        log.setLevel(level)
        for name, tries in before.items():
            setattr(datasets.config, name, tries)
