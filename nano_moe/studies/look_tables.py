"""Tables of what was read from trained weights, of experts on disk and of exchanges."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nano_moe.studies.schema import DECODED, EXCHANGED, LOOKED
from nano_moe.studies.tables import table

FIRST = 1 / 5  # of training, at which a table tells how many choices are final
SPECIALIZATION = (
    "What a token's expert tells of its domain, class and identity, less what shuffled labels "
    "would give: `information` in bits, mean over layers, and `share` of all that there is to "
    "tell.\n"
)
LEAK = (
    "Cross-entropies in nats per token: `ce_whole` of whole windows, read at once as in "
    "training; of their first halves alone, before their own second half (`ce_own_future`) "
    "and before another window's (`ce_other_future`); `ce_prefix` token by token, as in "
    "decoding, of every tenth window.\n"
)
HITS = (
    "Of the calls for an expert, the share that finds it in memory or on its way, with room "
    "for 25 or 50 % of the experts: `chance` if choices had no memory, `lru_hits` with the "
    "experts used last, `hits` with guesses from the next layer's router, too, of which the "
    "share `guesses_right` was called.\n"
)
DECODING = (
    "Memory of the decoding process; milliseconds per token with the file in the system's "
    "cache, from disk (`cold`), and at half the first one's speed; the share of calls that "
    "find their expert in memory.\n"
)
EXCHANGE = (
    "Bytes between ranks per token and sparse layer, forward and backward, measured and by "
    "the formula; milliseconds of a step in the exchange, outside it, and in all.\n"
)
COPIES = (
    "Other ranks, of four, that a token is sent to in a layer, and how many they would be if "
    "the router preferred no expert.\n"
)
TABLES = (
    (LOOKED["specialization"], SPECIALIZATION),
    (LOOKED["leak"], LEAK),
    (LOOKED["offload"], HITS),
    (LOOKED["exchange"], COPIES),
    (DECODED, DECODING),
    (EXCHANGED, EXCHANGE),
)
BY_LAYER = (
    "By layer: bits above the shuffled labels (and what these give); choices that were final "
    "at {first:.0%} of training (by chance: top_k of all experts); how often the two experts "
    "that go together most do so (any two by chance). A hash is not even, either: its closest "
    "pair is the fairer comparison.\n"
)


def look_tables(content: Mapping[str, Any]) -> str:
    """A table of the figures, and where experts were looked into, what lies behind them."""
    names = {name for runs in content["looks"].values() for run in runs.values() for name in run}
    parts = list(_figures(content))
    if "saturation" in names:
        parts += [_by_layer(content), *_top_tokens(content)]
    return "\n".join(parts)


def _figures(content: Mapping[str, Any]) -> Iterator[str]:
    for figures, meaning in TABLES:
        rows = []
        for member in content["members"]:
            runs = [run for run in content["runs"] if run["member"] == member]
            if all(name in run for run in runs for name in figures):
                rows.append((member, *(_spread([run[name] for run in runs]) for name in figures)))
        if rows:
            yield meaning
            yield table(("member", *(f"`{name}`" for name in figures)), rows)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _by_layer(content: Mapping[str, Any]) -> str:
    """Means over seeds: information less its shuffled floor, choices final early, and pairs."""
    rows = []
    for member, runs in content["looks"].items():
        for place, layer in enumerate(_layers(runs)):
            each = [run["layers"][place] for run in runs.values()]
            told = [
                statistics.fmean(one[name] - one[f"{name}_shuffled"] for one in each)
                for name in ("domain", "class")
            ]
            floors = [
                statistics.fmean(one[f"{name}_shuffled"] for one in each)
                for name in ("domain", "class")
            ]
            cells = [f"{bits:.3f} ({floor:.3f})" for bits, floor in zip(told, floors, strict=True)]
            final = statistics.fmean(_final_at(run["saturation"], place) for run in runs.values())
            pairs = statistics.fmean(max(map(max, one["coactivation"])) for one in each)
            share, chance = _by_chance(content["members"][member]["recipe"])
            early = f"{final:.2f} ({share:.2f})"
            rows.append((member, str(layer), *cells, early, f"{pairs:.2f} ({chance:.2f})"))
    header = (
        "member", "layer", "domain, bits (shuffled)", "class, bits (shuffled)",
        f"final at {FIRST:.0%} (by chance)", "closest pair (by chance)",
    )  # fmt: skip
    return BY_LAYER.format(first=FIRST) + "\n" + table(header, rows)


def _by_chance(recipe: Mapping[str, Any]) -> tuple[float, float]:
    """How often an expert is chosen, and how often by tokens that chose another one."""
    moe = recipe["model"]["moe"]
    return moe["top_k"] / moe["n_experts"], (moe["top_k"] - 1) / (moe["n_experts"] - 1)


def _layers(runs: Mapping[str, Any]) -> list[int]:
    return [one["layer"] for one in next(iter(runs.values()))["layers"]]


def _final_at(saturation: Mapping[str, Any], place: int) -> float:
    steps = saturation["steps"]
    nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - FIRST * steps[-1]))
    return float(saturation["layers"][place][nearest])


def _top_tokens(content: Mapping[str, Any]) -> Iterator[str]:
    """Of the first member and seed, the last layer."""
    member, runs = next(iter(content["looks"].items()))
    seed, run = next(iter(runs.items()))
    layer, experts = list(run["top_tokens"].items())[-1]
    rows = [
        (str(number), " ".join(_code(token) for token in tokens))
        for number, tokens in enumerate(experts)
    ]
    yield (
        f"What goes to each expert most surely ({member}, layer {layer}, seed {seed}; � is a "
        "part of a character's bytes):\n"
    )
    yield table(("expert", "tokens"), rows)


def _code(token: str) -> str:
    """As inline code in a cell of a table, with line ends and bars made visible."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("|", "¦").replace(" ", "␣")
    return f"`{shown.replace('`', 'ˋ')}`"
