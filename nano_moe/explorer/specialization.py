"""Who visits which expert: assignments by domain and by kind of token, and what they tell.

Shapes: W windows of T tokens, N = W*T tokens, E experts, K top_k, A values of an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from nano_moe.evaluation import count_pairs
from nano_moe.explorer.contract import Expert, Information, Specialization, Spread
from nano_moe.explorer.trace import rounded, texts
from nano_moe.model.balance import mutual_information
from nano_moe.model.gpt import GPT
from nano_moe.text.store import Corpus
from nano_moe.text.windows import EvalWindows

TOKENS = 65_536  # of the validation split, at most
BATCH = 1_024  # tokens between two looks at what else is to be done
SHUFFLES = 8
LISTED = 12  # tokens of an expert
FREQUENT = 20  # a token must occur this often to be called keen
KINDS = ("word start", "word part", "number", "punctuation", "white space", "other")


def specialization(model: GPT, corpus: Corpus) -> Generator[None, None, Specialization]:
    """Count over windows spread evenly over the validation split; yields between batches.

    Raises UserError for a model that sees the future.
    """
    model.config.check_causal()
    windows = EvalWindows(corpus.val, model.config.context, corpus.tokenizer.end_id)
    full = len(corpus.val) // model.config.context
    wanted = min(full, max(1, TOKENS // model.config.context))
    places = [i * full // wanted for i in range(wanted)]
    inputs, domains = (torch.from_numpy(np.stack([windows[i][j] for i in places])) for j in (0, 2))
    size = max(1, BATCH // model.config.context)
    chosen: dict[int, list[Tensor]] = {}
    for first in range(0, wanted, size):
        for layer, ids in _choices(model, inputs[first : first + size]).items():
            chosen.setdefault(layer, []).append(ids)
        yield
    return _document(corpus, model, inputs, domains, chosen)


def kind_of(text: str) -> int:
    """What a token looks like, as a place in KINDS; a word starts after a blank."""
    bare = text.strip()
    if not bare:
        return KINDS.index("white space")
    if bare.startswith("⟨") or "�" in bare:  # the end of a document, or half a character
        return KINDS.index("other")
    if bare.isalpha():
        return KINDS.index("word start" if text != bare else "word part")
    if bare.isnumeric():
        return KINDS.index("number")
    return KINDS.index("other" if any(c.isalnum() for c in bare) else "punctuation")


@torch.no_grad()
def _choices(model: GPT, inputs: Tensor) -> dict[int, Tensor]:
    """Per sparse layer, the experts (N, K) of a batch (B, T)."""
    _, routings = model(inputs)
    return {n: routing.ids for n, routing in enumerate(routings) if routing is not None}


def _document(
    corpus: Corpus, model: GPT, inputs: Tensor, domains: Tensor, chosen: dict[int, list[Tensor]]
) -> Specialization:
    ids = range(model.config.vocab_size)
    words = [texts(corpus.tokenizer, [token])[0] for token in ids]
    kinds = torch.tensor([kind_of(word) for word in words])[inputs]  # (W, T)
    attributes = {
        "domain": (domains, len(corpus.domains)),
        "kind": (kinds, len(KINDS)),
        "token": (inputs, len(words)),
    }
    return {
        "tokens": inputs.numel(),
        "of": len(corpus.val),
        "domains": list(corpus.domains),
        "kinds": list(KINDS),
        "layers": [
            _spread(layer, torch.cat(parts), attributes, model, words)
            for layer, parts in chosen.items()
        ],
    }


def _spread(
    layer: int,
    ids: Tensor,
    attributes: dict[str, tuple[Tensor, int]],
    model: GPT,
    words: list[str],
) -> Spread:
    assert model.config.moe is not None
    n_experts = model.config.moe.n_experts
    tables = {
        name: joint(values.flatten(), ids, (size, n_experts))
        for name, (values, size) in attributes.items()
    }
    load = tables["domain"].sum(0).double()
    share = load / load.sum()
    return {
        "layer": layer,
        "entropy": round(torch.special.entr(share).sum().item() / math.log(2), 4),
        "domains": tables["domain"].tolist(),
        "kinds": tables["kind"].tolist(),
        "information": [
            _information(name, attributes[name][0], ids, table) for name, table in tables.items()
        ],
        "experts": [
            _expert(expert, tables["token"], share[expert].item(), words)
            for expert in range(n_experts)
        ],
    }


def joint(values: Tensor, ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """How often a token of each attribute value (N,) chose each expert (N, K): (A, E)."""
    table = torch.zeros(shape, dtype=torch.int64)
    count_pairs(table, values, ids)
    return table


def _information(name: str, values: Tensor, ids: Tensor, table: Tensor) -> Information:
    shape = (table.shape[0], table.shape[1])
    seeds = range(SHUFFLES if name != "token" else 1)  # a large table, and little spread
    dealt = (shuffled(values, seed, whole_windows=name == "domain") for seed in seeds)
    control = [mutual_information(joint(anew, ids, shape)) for anew in dealt]
    return {
        "attribute": name,
        "bits": round(mutual_information(table).item(), 4),
        "control": round(torch.stack(control).mean().item(), 4),
    }


def shuffled(values: Tensor, seed: int, *, whole_windows: bool) -> Tensor:
    """Attribute values (W, T) dealt out anew, token by token or by whole windows: (N,).

    A window is of one text, so its tokens have more in common than their domain: only shuffling
    whole windows says what a domain tells beyond that.
    """
    generator = torch.Generator().manual_seed(seed)
    if whole_windows:
        return values[torch.randperm(len(values), generator=generator)].flatten()
    return values.flatten()[torch.randperm(values.numel(), generator=generator)]


def _expert(expert: int, tokens: Tensor, share: float, words: list[str]) -> Expert:
    """The tokens that come most, and the frequent ones most of whose assignments come here."""
    taken, top_k_times = tokens[:, expert], tokens.sum(1)
    most = taken.argsort(descending=True, stable=True)[:LISTED]
    affinity = torch.where(top_k_times >= FREQUENT, taken / top_k_times.clamp_min(1), 0)
    keen = affinity.argsort(descending=True, stable=True)[:LISTED]
    return {
        "share": round(share, 5),
        "most": [(words[i], int(taken[i])) for i in most.tolist() if taken[i]],
        "keenest": [
            (words[i], s)
            for i, s in zip(keen.tolist(), rounded(affinity[keen], 3), strict=True)
            if s
        ],
    }
