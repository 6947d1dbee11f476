"""What each figure of a run is counted in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nano_moe.studies.schema import LOOKED

UNITS = {
    "ce": "nats per token",
    "bpb": "bits per byte",
    "max_vio": "MaxVio",
    "max_share": "of assignments",
    "dead_experts": "experts",
    "starved_experts": "experts",
    "load_entropy": "load entropy",
    "dropped_share": "of assignments",
    "memory_gb": "GB",
    "train_ms_per_token": "ms per token",
    "decode_ms_per_token": "ms per token",
    "cold_ms_per_token": "ms per token",
    "half_speed_ms_per_token": "ms per token",
    "hits": "of calls",
    **dict.fromkeys(("exchange_bytes", "formula_bytes"), "bytes per token and layer"),
    **dict.fromkeys(("exchange_ms", "rest_ms", "step_ms"), "ms per step"),
    **dict.fromkeys(LOOKED["exchange"], "copies per token"),
    **dict.fromkeys(LOOKED["offload"], "of calls"),
    **dict.fromkeys(LOOKED["leak"], "nats per token"),
    "domain_information": "bits",
    "class_information": "bits",
    "token_information": "bits",
    "domain_share": "of the entropy",
    "class_share": "of the entropy",
}


def unit_of(one: Mapping[str, Any]) -> str:
    """A comparison's, or a trend's: its slope over all of its points."""
    unit = UNITS[one["figure"]]
    return f"{unit} per {one['per']}, on average" if "per" in one else unit


def yardstick(one: Mapping[str, Any]) -> str:
    """What a factor is of, where that is not the other member's own figure."""
    halved = one.get("than_figure") == "half_speed_ms_per_token"
    return " of half the speed" if halved else ""
