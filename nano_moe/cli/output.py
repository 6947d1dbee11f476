"""How verbs print: JSON, tables, figures with their units."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from nano_moe.accounting import Count
from nano_moe.config import Recipe


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    json.dump(finite(content), sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, to_stderr: bool = False
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # not str: brackets in a name are no markup
    console = Console(stderr=to_stderr)
    # A narrow terminal breaks lines, but loses no figure; a file or pipe has no width to keep to.
    unbound = console.options.update(width=10_000)
    console.width = max(console.width, console.measure(table, options=unbound).maximum)
    if title:
        console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table)


def print_count(title: str, counted: Count, *, to_stderr: bool = False) -> None:
    rows = [
        ("total parameters", f"{counted.total_params:,}"),
        ("active parameters per token", f"{counted.active_params:,}"),
        ("  of which embeddings and head", f"{counted.embedding_params:,}"),
        ("  of which routers", f"{counted.router_params:,}"),
        ("forward FLOPs per token", si(counted.forward_flops_per_token)),
        ("training FLOPs per token", si(counted.train_flops_per_token)),
        ("weights", size(counted.weight_bytes)),
        ("gradients", size(counted.gradient_bytes)),
        ("optimizer state", size(counted.optimizer_bytes)),
        ("KV cache per token", size(counted.kv_cache_bytes_per_token)),
    ]
    print_table(title, ("", "value"), rows, to_stderr=to_stderr)


def si(value: float) -> str:
    """1234567 as 1.23 M."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g}"


def note_processes(recipe: Recipe) -> None:
    trainer = recipe.trainer
    if trainer.strategy in ("fsdp", "ep") and (trainer.devices, trainer.nodes) == (1, 1):
        print(
            f"trainer.strategy: {trainer.strategy} on one process keeps all of the model there; "
            "trainer.devices=2 starts two",
            file=sys.stderr,
        )


def params(n: float) -> str:
    """46702792704 as 46.70B."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:,.{max(0, 4 - len(str(int(n / factor))))}f}{unit}"
    return f"{n:g}"


def size(n_bytes: float) -> str:
    """Bytes in units of 1024."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            n = n_bytes / factor
            return f"{n:,.0f} {unit}" if n >= 1000 else f"{n:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def finite(content: Any) -> Any:
    """What JSON can say of it: figures that are not finite become null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
