"""Sizes of a run, of its dense twins and of published models, from configurations alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nano_moe import recipe_file
from nano_moe.accounting import (
    STORED_BYTES,
    WeightGroup,
    attention_flops,
    parameters,
    weight_groups,
)
from nano_moe.config import ModelConfig
from nano_moe.errors import UserError
from nano_moe.explorer.contract import Band, Compute, Extra, Model, Part
from nano_moe.published import Published

PUBLISHED = Path("recipes/published")
EXPERTS = ("experts", "shared_experts")


def compute(name: str, model: ModelConfig) -> Compute:
    """The document of a run."""
    groups = list(weight_groups(model))
    moe = model.moe
    n_experts, top_k = (0, 0) if moe is None else (moe.n_experts, moe.top_k)
    return {
        "run": size(name, groups, n_experts, top_k, note=_shape(model)),
        "twins": [] if moe is None else list(_twins(groups, n_experts, top_k)),
        "bands": list(bands(model)),
        "bytes": dict(STORED_BYTES),
        "attention_flops": attention_flops(model),
        "context": model.context,
        "published": list(published()),
    }


def size(
    name: str,
    groups: list[WeightGroup],
    n_experts: int,
    top_k: float,
    *,
    note: str = "",
    rumour: bool = False,
) -> Model:
    """Parameters and FLOPs of weights, and what changes with one more expert per token."""
    total, active = parameters(groups)
    experts = [g for g in groups if g.kind == "experts" and n_experts]
    once = sum(g.size * g.copies for g in experts) // n_experts if experts else 0
    more: Extra = {
        "total": 0,
        "active": once,
        "flops": 2 * round(sum(g.size * g.products for g in experts) / top_k) if experts else 0,
    }
    return {
        "name": name,
        "note": note,
        "total": total,
        "active": active,
        "flops": 2 * sum(g.size * g.products for g in groups),
        "n_experts": n_experts,
        "top_k": top_k,
        "more": more,
        "rumour": rumour,
    }


def dense_twin(groups: list[WeightGroup], *, every_expert: bool) -> list[WeightGroup]:
    """The same model with one FFN as wide as the experts that a token visits, or as all of them."""
    twin = []
    for g in groups:
        if g.kind in EXPERTS and g.name != "shared_gate":
            copies = g.copies if every_expert else g.active
            twin.append(g._replace(kind="ffn", copies=copies, active=copies, products=copies))
        elif g.kind not in ("router", *EXPERTS):
            twin.append(g)
    return twin


def bands(model: ModelConfig) -> Iterator[Band]:
    """Where the weights are: embedding, layer by layer, head; their sum is the model."""
    groups = list(weight_groups(model))
    sizes = {g.name: g.size for g in groups}
    inner = sum(g.size * g.copies for g in groups if g.kind in ("attention", "norm"))
    last_norm = sizes["norms"]
    per_layer = (inner - last_norm) // model.n_layers
    ffn, outer = _ffn_parts(model, groups), sizes["embedding"]
    tied = model.tie_embeddings
    name = "embedding and head, one table" if tied else "embedding"
    yield _band(name, None, [_part("embedding", outer + (last_norm if tied else 0))])
    for layer in range(model.n_layers):
        kind = "sparse" if model.is_sparse(layer) else "dense"
        yield _band(f"layer {layer}", layer, [_part("attention", per_layer), *ffn[kind]])
    if not tied:
        yield _band("head", None, [_part("head", sizes["head"] + last_norm)])


def published(folder: Path = PUBLISHED) -> Iterator[Model]:
    """The published models that are counted here, smallest first; none where the folder is not."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            loaded = recipe_file.load_any(path)
        except UserError:
            continue  # make count says what is wrong with it
        if isinstance(loaded, Published) and loaded.published is not None:
            found.append(_published(loaded))
    yield from sorted(found, key=lambda model: model["total"])


def _published(loaded: Published) -> Model:
    about = loaded.published
    assert about is not None
    if loaded.model is not None:
        groups = list(weight_groups(loaded.model))
    else:
        groups = [listing.group() for listing in loaded.weights or ()]
    n_experts = loaded.experts_per_layer or 0
    top_k = 0 if loaded.model is None or loaded.model.moe is None else loaded.model.moe.top_k
    return size(
        about.name,
        groups,
        n_experts,
        top_k or _experts_used(groups, n_experts),
        note=about.source,
        rumour=about.rumour,
    )


def _experts_used(groups: list[WeightGroup], n_experts: int) -> float:
    """Experts that a token visits in a layer, of a listing."""
    experts = [g for g in groups if g.kind == "experts"]
    copies = sum(g.size * g.copies for g in experts)
    return round(n_experts * sum(g.size * g.active for g in experts) / copies, 2) if copies else 0


def _twins(groups: list[WeightGroup], n_experts: int, top_k: int) -> Iterator[Model]:
    more = size("", groups, n_experts, top_k)["more"]
    twin = size("dense, equal active", dense_twin(groups, every_expert=False), 0, 0)
    twin["note"] = "one FFN as wide as the experts that a token visits, no router"
    twin["more"] = {**more, "total": more["active"]}
    yield twin
    large = size("dense, equal total", dense_twin(groups, every_expert=True), 0, 0)
    large["note"] = "one FFN as wide as all experts together, no router"
    yield large


def _shape(model: ModelConfig) -> str:
    moe = model.moe
    if moe is None:
        return f"{model.n_layers} layers, one FFN of {model.d_ff} in each"
    shared = f" and {moe.n_shared_experts} shared" if moe.n_shared_experts else ""
    return f"{moe.top_k} of {moe.n_experts} experts of {model.expert_width}{shared}"


def _ffn_parts(model: ModelConfig, groups: list[WeightGroup]) -> dict[str, list[Part]]:
    """Parts of one dense and of one sparse layer's feed-forward network."""
    sparse = sum(model.is_sparse(layer) for layer in range(model.n_layers))
    layers = {"ffn": model.n_layers - sparse}
    sums = {
        kind: sum(g.size * g.copies for g in groups if g.kind == kind)
        // (layers.get(kind, sparse) or 1)
        for kind in ("ffn", "router", "shared_experts", "experts")
    }
    n_experts = 0 if model.moe is None else model.moe.n_experts
    small = [_part(kind, sums[kind]) for kind in ("router", "shared_experts") if sums[kind]]
    return {
        "dense": [_part("ffn", sums["ffn"])],
        "sparse": [*small, _part("experts", sums["experts"], n_experts)],
    }


def _part(kind: str, params: int, experts: int = 0) -> Part:
    return {"kind": kind, "params": params, "experts": experts}


def _band(name: str, layer: int | None, parts: list[Part]) -> Band:
    return {"name": name, "layer": layer, "parts": parts}
