"""What TensorBoard needs besides scalars: what the run is, and how to lay runs out side by side.

    recipe, accounting        text: the resolved recipe, and what it costs
    HParams                   the fields that runs differ in, with the last val/ce, bpb, max_vio
    Custom Scalars            CE by tokens, FLOPs, time; balance; loads; every run in one chart
    routing/load              image: share of assignments by layer and expert, at each validation
    routing/domains           image: the same by layer and domain

Shapes: R rows, C columns, E experts, A domains, L sparse layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from nano_moe.accounting import count
from nano_moe.config import Recipe
from nano_moe.runs import Run

# What a place on an axis counts, so finely that no place is below the number of the step: a resumed
# run can then hide what came after its checkpoint, as TensorBoard does by number.
UNITS = {"tokens": ("tokens", 1), "megaflops": ("flops", 1e-6), "milliseconds": ("seconds", 1e3)}
CELL_WIDTH, CELL_HEIGHT, MARGIN = 36, 18, 160  # pixels
LIGHT, DARK = np.array([255, 255, 255]), np.array([0, 64, 128])
PRICES = (
    "total_params", "active_params", "router_params", "weight_bytes", "train_flops_per_token",
)  # fmt: skip


def describe_run(events: SummaryWriter, run: Run) -> None:
    """Write the text, HParams and the layout, once per run."""
    recipe = run.recipe()
    events.add_text("recipe", f"```yaml\n{run.recipe_file.read_text(encoding='utf-8')}\n```")
    events.add_text("accounting", _accounting(recipe))
    events.add_custom_scalars(layout(recipe))
    fields, metrics = hyperparameters(recipe), dict.fromkeys(("val/ce", "val/bpb"), 0.0)
    if recipe.model.moe is not None:
        metrics["val/max_vio"] = 0.0
    writer = events._get_file_writer()
    for summary in hparams(fields, metrics):
        writer.add_summary(summary)


def _accounting(recipe: Recipe) -> str:
    counted = count(recipe)._asdict()
    rows = "".join(f"| {name} | {counted[name]:,} |\n" for name in PRICES)
    return f"| what | amount |\n| --- | ---: |\n{rows}"


def hyperparameters(recipe: Recipe) -> dict[str, Any]:
    """What runs of this kit differ in, by dotted field; a dense run has 0 experts."""
    model, moe = recipe.model, recipe.model.moe
    counted = count(recipe)
    sparse = ("n_experts", "top_k", "n_shared_experts", "load_balancing_loss", "bias_update_rate")
    return {
        "seed": recipe.seed,
        "optim.name": recipe.optim.name,
        "optim.lr": recipe.optim.lr,
        "trainer.steps": recipe.trainer.steps,
        "tokens_per_step": recipe.tokens_per_step,
        "model.n_layers": model.n_layers,
        "model.d_model": model.d_model,
        "model.moe.routing": "dense" if moe is None else moe.routing,
        **{f"model.moe.{name}": getattr(moe, name) if moe else 0 for name in sparse},
        "total_params": counted.total_params,
        "active_params": counted.active_params,
    }


def layout(recipe: Recipe) -> dict[str, dict[str, list[Any]]]:
    """Charts of the Custom Scalars tab; TensorBoard merges those of all runs that are shown."""
    compare = {
        f"{split} CE by {unit}": ["Multiline", [f"by_{unit}/{tag}"]]
        for split, tag in (("training", "train_ce"), ("validation", "val_ce"))
        for unit in UNITS
    }
    if recipe.model.moe is None:
        return {"Compare": compare}
    balance = {
        "MaxVio, every layer": ["Multiline", ["moe/layer.*/max_vio"]],
        "busiest expert's share": ["Multiline", ["moe/layer.*/max_share"]],
        "dead experts": ["Multiline", ["moe/layer.*/dead_experts"]],
        "load entropy": ["Multiline", ["moe/layer.*/load_entropy"]],
    }
    loads = {
        f"layer {layer}": ["Multiline", [f"moe_load/layer{layer}/.*"]]
        for layer in range(recipe.model.n_layers)
        if recipe.model.is_sparse(layer)
    }
    return {"Compare": compare, "Balance": balance, "Loads by expert": loads}


def by_budget(row: dict[str, float]) -> list[tuple[str, float, int]]:
    """(tag, value, place on the axis) of a row's losses over tokens, FLOPs and time."""
    return [
        (f"by_{unit}/{tag.replace('/', '_')}", row[tag], round(row[budget] * scale))
        for unit, (budget, scale) in UNITS.items()
        for tag in ("train/ce", "val/ce")
        if tag in row
    ]


def routing_images(
    routing: Sequence[dict[str, Any]], domains: Sequence[str]
) -> dict[str, np.ndarray]:
    """(height, width, 3) uint8 by tag, from the rows of an evaluation; none for a dense model."""
    if not routing:
        return {}
    layers = [f"layer {row['layer']}" for row in routing]
    experts = max(len(row["load"]) for row in routing)
    by_domain = [row["domain_load"][i] for row in routing for i in range(len(domains))]
    names = [f"{layer}, {domain}" for layer in layers for domain in domains]
    return {
        "routing/load": heat_map([row["load"] for row in routing], layers, experts),
        "routing/domains": heat_map(by_domain, names, experts),
    }


def heat_map(shares: Sequence[Sequence[float]], names: Sequence[str], columns: int) -> np.ndarray:
    """Rows of shares as cells, the darker the larger, with their per cent: (h, w, 3) uint8."""
    width, height = MARGIN + columns * CELL_WIDTH, (len(shares) + 1) * CELL_HEIGHT
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for column in range(columns):
        pen.text((MARGIN + column * CELL_WIDTH + 6, 2), f"e{column}", "black", font)
    darkest = max(max(row) for row in shares) or 1.0
    for number, (name, row) in enumerate(zip(names, shares, strict=True)):
        top = (number + 1) * CELL_HEIGHT
        pen.text((4, top + 2), name, "black", font)
        for column, share in enumerate(row):
            _cell(pen, font, MARGIN + column * CELL_WIDTH, top, share, share / darkest)
    return np.asarray(image)


def _cell(pen: Any, font: Any, left: int, top: int, share: float, tone: float) -> None:
    colour = tuple(int(c) for c in LIGHT + (DARK - LIGHT) * tone)
    pen.rectangle((left, top, left + CELL_WIDTH - 2, top + CELL_HEIGHT - 2), colour)
    pen.text((left + 5, top + 2), f"{100 * share:.1f}", "white" if tone > 0.55 else "black", font)
