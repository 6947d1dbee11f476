"""Who visits which expert: assignments by domain and by kind of token, and what they tell.

Shapes: W windows of T tokens, N = W*T tokens, E experts, K top_k, A values of an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from nano_moe.evaluation import spread_windows
from nano_moe.explorer.contract import Expert, Information, Specialization, Spread
from nano_moe.explorer.trace import rounded, texts
from nano_moe.model.gpt import GPT
from nano_moe.specialization import KINDS, affinity, joint, kind_of, told
from nano_moe.text.store import Corpus

TOKENS = 65_536  # of the validation split, at most
BATCH = 1_024  # tokens between two looks at what else is to be done
SHUFFLES = 8
LISTED = 12  # tokens of an expert
FREQUENT = 20  # a token must occur this often to be called keen


def specialization(model: GPT, corpus: Corpus) -> Generator[None, None, Specialization]:
    """Count over windows spread evenly over the validation split; yields between batches.

    Raises UserError for a model that sees the future.
    """
    model.config.check_causal()
    wanted = max(1, TOKENS // model.config.context)
    inputs, _, domains = spread_windows(corpus, model.config.context, wanted)
    size = max(1, BATCH // model.config.context)
    chosen: dict[int, list[Tensor]] = {}
    for first in range(0, len(inputs), size):
        for layer, ids in _choices(model, inputs[first : first + size]).items():
            chosen.setdefault(layer, []).append(ids)
        yield
    return _document(corpus, model, inputs, domains, chosen)


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
    kinds = torch.tensor([kind_of(piece) for piece in corpus.tokenizer.pieces])[inputs]  # (W, T)
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


def _information(name: str, values: Tensor, ids: Tensor, table: Tensor) -> Information:
    shuffles = SHUFFLES if name != "token" else 1  # a large table, and little spread
    found = told(values, ids, table, whole_windows=name == "domain", shuffles=shuffles)
    return {
        "attribute": name,
        "bits": round(found.bits, 4),
        "control": round(found.control, 4),
    }


def _expert(expert: int, tokens: Tensor, share: float, words: list[str]) -> Expert:
    """The tokens that come most, and the frequent ones most of whose assignments come here."""
    taken, keenness = tokens[:, expert], affinity(tokens, FREQUENT)[:, expert]
    most = taken.argsort(descending=True, stable=True)[:LISTED]
    keen = keenness.argsort(descending=True, stable=True)[:LISTED]
    return {
        "share": round(share, 5),
        "most": [(words[i], int(taken[i])) for i in most.tolist() if taken[i]],
        "keenest": [
            (words[i], s)
            for i, s in zip(keen.tolist(), rounded(keenness[keen], 3), strict=True)
            if s
        ],
    }
