"""Is it domain or syntax that experts learn? What a token's expert tells about the token.

Mutual information of expert with domain, with kind of token and with token id over the validation
split, less what the same labels in random order would give; router saturation and co-activation
as in OLMoE (Muennighoff et al. 2024, sec. 5).

Shapes: W windows of T tokens, N = W*T tokens, E experts, K top_k, A values of an attribute.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano_moe.checkpoints import load_model
from nano_moe.device import choose_precision
from nano_moe.evaluation import autocast, spread_windows
from nano_moe.runs import Run
from nano_moe.specialization import KINDS, affinity, joint, kind_of, told
from nano_moe.text.store import Corpus

TOP = 8  # tokens shown per expert
SEEN = 20  # times that such a token occurs at least
SHUFFLES = 3


class Attribute(NamedTuple):
    """A label for each token, of `size` values; of whole windows where `of_texts`."""

    values: Tensor  # (W, T)
    size: int
    of_texts: bool = False


def look(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Information in bits, mean over layers, and as a share of the attribute's entropy."""
    tokens, domains, layers = _choices(run, corpus)
    kinds = torch.tensor([kind_of(piece) for piece in corpus.tokenizer.pieces])
    vocabulary = len(corpus.tokenizer.pieces)
    attributes = {
        "domain": Attribute(domains, len(corpus.domains), of_texts=True),
        "class": Attribute(kinds[tokens], len(KINDS)),
        "token": Attribute(tokens, vocabulary),
    }
    n_experts = run.recipe().model.moe.n_experts  # type: ignore[union-attr]
    rows = [_layer(number, ids, n_experts, attributes) for number, ids in layers.items()]
    figures = {
        f"{name}_information": statistics.fmean(row[name] - row[f"{name}_shuffled"] for row in rows)
        for name in attributes
    }
    for name in ("domain", "class"):
        held = _entropy(attributes[name])
        figures[f"{name}_share"] = figures[f"{name}_information"] / held if held else 0.0
    pieces = [piece.decode(errors="replace") for piece in corpus.tokenizer.pieces]
    details = {
        "entropy": {name: _entropy(attribute) for name, attribute in attributes.items()},
        "layers": rows,
        "saturation": saturation(run),
        "top_tokens": {
            str(number): _top_tokens(ids, n_experts, attributes["token"], pieces)
            for number, ids in layers.items()
        },
    }
    return {"figures": figures, "details": details}


@torch.no_grad()
def _choices(run: Run, corpus: Corpus) -> tuple[Tensor, Tensor, Mapping[int, Tensor]]:
    """Input tokens (W, T), domains (W, T), and per sparse layer the chosen experts (N, K)."""
    recipe, model, _ = load_model(run)
    context = recipe.model.context
    tokens, _, domains = spread_windows(corpus, context, len(corpus.val) // context)
    layers: dict[int, list[Tensor]] = {}
    for inputs in tokens.split(recipe.trainer.batch_size):
        with autocast(inputs.device, choose_precision(recipe)):
            _, routings = model(inputs)
        for number, routing in enumerate(routings):
            if routing is not None:
                layers.setdefault(number, []).append(routing.ids)
    return tokens, domains, {number: torch.cat(ids) for number, ids in layers.items()}


def _layer(
    number: int, ids: Tensor, n_experts: int, attributes: Mapping[str, Attribute]
) -> dict[str, Any]:
    """Information in bits with and without shuffled labels; how often experts go together."""
    row: dict[str, Any] = {"layer": number}
    for name, (values, size, of_texts) in attributes.items():
        table = joint(values.flatten(), ids, (size, n_experts))
        row[name], row[f"{name}_shuffled"] = told(
            values, ids, table, whole_windows=of_texts, shuffles=SHUFFLES
        )
    return {**row, "coactivation": coactivation(ids, n_experts).tolist()}


def _entropy(attribute: Attribute) -> float:
    """Bits that the attribute itself holds."""
    shares = torch.bincount(attribute.values.flatten(), minlength=attribute.size).double()
    shares = shares / shares.sum()
    return torch.special.entr(shares).sum().item() / math.log(2)


def coactivation(ids: Tensor, n_experts: int) -> Tensor:
    """Of the tokens that chose an expert, the share that chose each other one: (N, K) -> (E, E).

    By chance it is (K - 1) / (E - 1). Muennighoff et al. 2024, eq. 6.
    """
    chosen = torch.zeros(len(ids), n_experts).scatter_(1, ids, 1.0)  # (N, E)
    together = chosen.T @ chosen
    alone = together.diagonal().clamp_min(1)
    return (together / alone[:, None]).fill_diagonal_(0).mul(1e4).round().div(1e4)


def _top_tokens(
    ids: Tensor, n_experts: int, token: Attribute, pieces: list[str]
) -> list[list[str]]:
    """Per expert, the tokens that go to it most often when they occur, the surest first."""
    table = joint(token.values.flatten(), ids, (token.size, n_experts))
    share = affinity(table, SEEN * ids.shape[1])
    best = share.topk(min(TOP, token.size), dim=0).indices.T  # (E, TOP)
    return [[pieces[i] for i in row if share[i, expert] > 0] for expert, row in enumerate(best)]


def folder_of(run: Run) -> Path:
    """Where a watched training leaves the choices of a few fixed tokens."""
    return run.path / "choices"


def saturation(run: Run) -> dict[str, Any]:
    """Per layer, the share of final choices that were made already at each step.

    Of the same tokens; by chance it is K / E. Muennighoff et al. 2024 (OLMoE), eq. 5.
    """
    files = sorted(folder_of(run).glob("*.npy"))
    final = np.load(files[-1])  # (L, N, K)
    shares = [_overlap(np.load(file), final) for file in files]
    layers = [[round(float(share[layer]), 4) for share in shares] for layer in range(len(final))]
    return {"steps": [int(file.stem) for file in files], "layers": layers}


def _overlap(ids: np.ndarray, final: np.ndarray) -> np.ndarray:  # (L, N, K) twice -> (L,)
    same = ids[..., :, None] == final[..., None, :]
    return same.any(-1).mean((-2, -1))
