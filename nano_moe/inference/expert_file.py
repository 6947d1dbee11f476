"""A run's experts on disk, one by one, so that any of them is read without the others.

`experts.safetensors` in the run folder holds two tensors per expert, `rest.safetensors` all other
weights; both are made from the checkpoint once, and again when it has changed.

Shapes: D d_model, F hidden width of an expert.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nano_moe.checkpoints import fill
from nano_moe.errors import UserError
from nano_moe.files import remove_abandoned, replacing
from nano_moe.model.experts import Experts
from nano_moe.model.gpt import GPT
from nano_moe.model.moe import MoE
from nano_moe.runs import Run

EXPERTS, REST = "experts.safetensors", "rest.safetensors"
MARK, STEP = "checkpoint", "step"  # in a file's metadata: which one it was made from
MADE_OF = ("first", "down")
DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # of a decoder's weights and tables


class Place(NamedTuple):
    """Where one tensor lies in the file."""

    start: int
    end: int
    shape: tuple[int, ...]


class ExpertFile:
    """Experts by (layer, number), copied out of a mapped file whose pages are let go at once."""

    def __init__(self, path: Path):
        self.path = path
        header, start = _header(path)
        self.places = {
            name: _place(one, start) for name, one in header.items() if name != "__metadata__"
        }
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(layer, expert) of all that it holds."""
        names = (name.split(".") for name in self.places)
        return [(int(layer), int(expert)) for layer, expert, part in names if part == "first"]

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of an expert's two weights: (2F or F, D) and (D, F)."""
        layer, expert = self.keys[0]
        first, down = (self.places[_name(layer, expert, part)].shape for part in MADE_OF)
        return first, down

    @property
    def expert_bytes(self) -> int:
        layer, expert = self.keys[0]
        places = [self.places[_name(layer, expert, part)] for part in MADE_OF]
        return sum(place.end - place.start for place in places)

    def read(self, layer: int, expert: int, first: Tensor, down: Tensor) -> None:
        """Copy an expert's two weights into float32 tensors of their shapes."""
        for part, into in zip(MADE_OF, (first, down), strict=True):
            place = self.places[_name(layer, expert, part)]
            n = (place.end - place.start) // 4
            source = np.frombuffer(self._map, np.float32, n, place.start)
            np.copyto(into.numpy(), source.reshape(place.shape))
        self._let_go()

    def _let_go(self) -> None:
        """All pages of the mapping: with those that are read the system maps their neighbours.

        The system's cache of the file keeps them as it sees fit.
        """
        self._map.madvise(mmap.MADV_DONTNEED)


def _place(one: dict, start: int) -> Place:
    first, last = one["data_offsets"]
    return Place(start + first, start + last, tuple(one["shape"]))


def _name(layer: int, expert: int, part: str) -> str:
    return f"{layer}.{expert}.{part}"


def _header(path: Path) -> tuple[dict, int]:
    """A safetensors file's header, and where its data begins."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def split_weights(run: Run) -> tuple[ExpertFile, dict[str, Tensor], int]:
    """The run's experts, all its other weights, and their step; raises UserError if it is dense."""
    recipe = run.recipe()
    if recipe.model.moe is None:
        raise UserError(f"{run.path}: a dense run has no experts to leave on disk")
    recipe.model.check_causal()
    mark = _mark(run)
    if any(_made_from(run.path / name) != mark for name in (EXPERTS, REST)):
        _split(run, mark)
    with safe_open(run.path / REST, "pt") as file:
        rest = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        step = int(file.metadata()[STEP])
    return ExpertFile(run.path / EXPERTS), rest, step


def _mark(run: Run) -> str:
    if not run.weights:
        raise UserError(f"{run.last}: no such checkpoint; the run may not have saved one yet")
    path = run.weights[0]
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"


def _made_from(path: Path) -> str | None:
    """None where there is no such file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(MARK)
    except (OSError, SafetensorError):
        return None


def _split(run: Run, mark: str) -> None:
    """With one tensor at a time in memory: those of the checkpoint stay in its file."""
    with torch.device("meta"):
        model = GPT(run.recipe().model)
    dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
    step = fill(model, run, mapped=True)
    experts = {
        _name(layer, number, part): weight[number].float()
        for layer, block in enumerate(model.blocks)
        if isinstance(block.ffn, MoE) and isinstance(block.ffn.experts, Experts)
        for part, weight in zip(MADE_OF, block.ffn.experts.weights, strict=True)
        for number in range(len(weight))
    }
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    rest = {
        name: weight.to(dtypes[name])
        for name, weight in model.state_dict().items()
        if ".experts." not in name and name not in tied
    }
    for name, tensors in ((EXPERTS, experts), (REST, rest)):
        remove_abandoned(run.path / name)
        with replacing(run.path / name) as file:
            _write(file, tensors, {MARK: mark, STEP: str(step)})


def _write(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """What safetensors' own `save` returns, which holds all of it at once, several times over."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = dict[str, Mapping]({"__metadata__": metadata}), 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensors[name].detach().contiguous().numpy().data)
