"""A run that is being looked at: found, opened piece by piece, its documents made on demand.

What needs PyTorch is imported when it is needed, so that the page is there before it.
"""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano_moe import checkpoints, runs
from nano_moe.accounting import count
from nano_moe.config import MoEConfig
from nano_moe.errors import UserError
from nano_moe.explorer.balance import balance
from nano_moe.explorer.compute import compute
from nano_moe.explorer.contract import (
    Balance,
    Card,
    Compute,
    Domain,
    Overview,
    Passages,
    Settings,
    Specialization,
    Step,
    Trace,
)
from nano_moe.runs import Run

if TYPE_CHECKING:
    from nano_moe.model.gpt import GPT
    from nano_moe.text.store import Corpus
    from nano_moe.text.tokenizer import Tokenizer

TEXT, GENERATED = 8_000, 500  # characters of a text, tokens of a continuation: at most
KEPT = 64  # traces of texts that may be asked for again
DENSE = "{}: a dense run; every token takes the same way, so there is nothing to show here"


def find(name: str, root: Path = runs.ROOT) -> Opened:
    """The run of that name or path, which must lie within `root`; raises UserError."""
    inside = root / name
    run = Run(inside) if runs.is_run(inside) else runs.find(name, root)
    path = run.path.resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError(f"{name}: lies outside of {root}/; copy or move the run into it")
    return Opened(run, path.relative_to(root.resolve()).as_posix())


def overview(opened: Sequence[Opened], *, live: bool) -> Overview:
    """The document that the page opens with."""
    names = " ".join(one.name for one in opened)
    command = f'make explore RUNS="{names}"' if len(opened) > 1 else f"make explore RUN={names}"
    return {
        "live": live,
        "command": command,
        "version": runs.versions()["nano-moe"] or "",
        "limits": {"text": TEXT, "tokens": GENERATED},
        "runs": [one.card() for one in opened],
    }


class Opened:
    """One run and all that the page can ask of it; not for several threads at a time."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name
        self.recipe = run.recipe()
        self.route = lru_cache(KEPT)(self._route)
        self.passage = lru_cache(KEPT)(self._passage)

    @cached_property
    def model(self) -> GPT:
        return checkpoints.load_model(self.run)[1]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from nano_moe.text.tokenizer import load_for

        return load_for(self.run.tokenizer_file, self.recipe.model.vocab_size)

    @cached_property
    def corpus(self) -> Corpus:
        from nano_moe.text.store import prepare

        model = self.recipe.model
        corpus = prepare(self.recipe.data, model.vocab_size, model.context, progress=False)
        runs.check_corpus(self.run, corpus)
        return corpus

    def warm_up(self) -> None:
        """Load what routing a text needs and have its kernels compiled."""
        self.route("Once upon a time")

    def card(self) -> Card:
        moe, counted = self.recipe.model.moe, count(self.recipe)
        step, ce = _last_validation(self.run)
        return {
            "name": self.name,
            "step": step,
            "ce": ce,
            "n_layers": self.recipe.model.n_layers,
            "layers": [n for n in range(self.recipe.model.n_layers) if self._is_sparse(n)],
            "n_experts": 0 if moe is None else moe.n_experts,
            "top_k": 0 if moe is None else moe.top_k,
            "n_shared": 0 if moe is None else moe.n_shared_experts,
            "shared_gate": moe is not None and moe.shared_expert_gate,
            "n_groups": 0 if moe is None else moe.n_groups,
            "routing": "" if moe is None else moe.routing,
            "balancing": "" if moe is None else balancing(moe),
            "capacity_factor": None if moe is None else moe.capacity_factor,
            "causal": self.recipe.model.is_causal,
            "total": counted.total_params,
            "active": counted.active_params,
            "prompt": self.recipe.trainer.sample_prompt,
        }

    def compute(self) -> Compute:
        return compute(self.name, self.recipe.model)

    def balance(self) -> Balance:
        self._check_sparse()
        return balance(self.run)

    def passages(self) -> Passages:
        from nano_moe.explorer.passages import EACH, n_passages

        named = enumerate(self.corpus.domains)
        held: list[Domain] = [
            {"number": d, "name": name} for d, name in named if n_passages(self.corpus, d)
        ]
        return {"domains": held, "each": EACH}

    def specialization(self) -> Generator[None, None, Specialization]:
        """Yields between parts of the work, for there may be more urgent requests."""
        self._check_sparse()
        from nano_moe.explorer.specialization import specialization

        return specialization(self.model, self.corpus)

    def generate(self, prompt: str, settings: Settings) -> Iterator[Step]:
        from nano_moe.explorer.generation import steps

        return steps(self.model, self.tokenizer, prompt, settings)

    def _route(self, text: str) -> Trace:
        from nano_moe.explorer.trace import trace_text

        return trace_text(self.model, self.tokenizer, text)

    def _passage(self, domain: int, number: int) -> Trace:
        from nano_moe.explorer.passages import n_passages, passage
        from nano_moe.explorer.trace import trace_tokens

        if not 0 <= number < n_passages(self.corpus, domain):
            raise UserError(f"passage {number} of domain {domain}: there is none; choose another")
        ids = passage(self.corpus, domain, number, self.recipe.model.context)
        return trace_tokens(self.model, self.tokenizer, ids, domain=self.corpus.domains[domain])

    def _is_sparse(self, layer: int) -> bool:
        return self.recipe.model.is_sparse(layer)

    def _check_sparse(self) -> None:
        if self.recipe.model.moe is None:
            raise UserError(DENSE.format(self.name))


def balancing(moe: MoEConfig) -> str:
    """What keeps the load even, in words."""
    means = {
        f"load-balancing loss {moe.load_balancing_loss:g}": moe.load_balancing_loss,
        f"bias, {moe.bias_rule} rule, {moe.bias_update_rate:g}": moe.bias_update_rate,
        f"capacity {moe.capacity_factor or 0:g}": moe.capacity_factor,
        "a fixed hash": moe.routing == "hash",
        "experts choose": moe.routing == "expert_choice",
        "noisy choice": moe.noisy_top_k,
    }
    return ", ".join(words for words, given in means.items() if given) or "no balancing"


def _last_validation(run: Run) -> tuple[int | None, float | None]:
    """(step, cross-entropy), as far as metrics.csv knows them."""
    try:
        with open(run.metrics_file, newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row.get("val/ce")]
        return int(rows[-1]["step"]), round(float(rows[-1]["val/ce"]), 4)
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error):
        return None, None
