"""Decoding with a cache: against `transformers.generate`, and by the weights that a token touches.

Weights are as drawn. Against transformers both sides continue the same prompts greedily, ours by
`Decoding`, theirs in the class that the recipe exports to, with our weights. By size, a sparse
decoder lies between two dense ones: as large as its active weights, and as all of them.

Shapes: B prompts, P tokens of each, N new ones.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nano_moe import recipe_file
from nano_moe.accounting import FLOAT32_BYTES, count
from nano_moe.bench.peers import HOW_TO_HAVE
from nano_moe.bench.recipes import FOLDER, QUICK
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK as QUICK_ROUNDS
from nano_moe.bench.timing import Budget, Case, Spread, Timings, interleave
from nano_moe.config import Recipe
from nano_moe.inference.decoding import Decoding
from nano_moe.inference.sampling import likeliest
from nano_moe.model.gpt import GPT, init_weights

Side = Callable[[Tensor, int], list[list[int]]]  # prompts (B, P) and N to B continuations of N
RECIPES = ("dense", "mixtral", "deepseek")
BATCHES = (1, 16)
TARGET = 3.0
PROMPT, TOKENS = 8, 120
ROUNDS = Budget(seconds=15, min_rounds=7)
A_LOOK = Budget(seconds=0, min_rounds=3, warm_up=1)
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")  # of experts, in transformers

LARGE = ("model.n_layers=8", "model.d_model=1024", "model.n_heads=16", "model.d_ff=4096")
SPARSE = "8 experts top-2"
# Name -> recipe, its changes, what is expected of its speed over the sparse one's.
SIZES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "dense, active size": ("dense.yaml", LARGE, "1 or more"),
    SPARSE: ("mixtral.yaml", LARGE, None),
    "dense, total size": ("dense.yaml", (*LARGE, "model.d_ff=16384"), "below 1"),
}
STEPS = 16  # tokens per round

NOTES = (
    f"rows: prompts at once, of {PROMPT} tokens. tokens/s: {TOKENS} new ones of each, greedy, over "
    "the time of both reading and continuing; no end token stops either side. transformers runs "
    "with the fastest of its implementations of experts, tried first.",
    "by size: one prompt, which is read before. Touched: the weights that one token meets, counted "
    "from the recipe as `nano-moe count` does; GB/s: of those. Held: whether the speed over the "
    "sparse decoder's, within rounds, is what was expected.",
)


def decode(quick: bool) -> Report:
    """A row per recipe and number of prompts against transformers, then one per size."""
    rows = [row for name in RECIPES for row in _against(name, quick)]
    return Report("Decoding", [*rows, *_by_size(quick)], NOTES)


# --- against transformers ------------------------------------------------------------------------


def _against(name: str, quick: bool) -> Iterator[Row]:
    recipe = recipe_file.load(FOLDER / f"{name}.yaml", QUICK if quick else ())
    model, theirs = _drawn(recipe), None
    if importlib.util.find_spec("transformers") is not None:
        theirs = Theirs(model)
    for n_rows in BATCHES:
        prompts = _prompts(recipe, n_rows, 4 if quick else PROMPT)
        yield {"recipe": name, "rows": n_rows, **_contest(model, theirs, prompts, quick)}


def _contest(model: GPT, theirs: Theirs | None, prompts: Tensor, quick: bool) -> Row:
    """Both sides in turn on the same prompts (B, P)."""
    n_new, texts = 8 if quick else TOKENS, {}
    sides: dict[str, Side] = {"ours": functools.partial(greedy, model)}
    if theirs is not None:
        theirs.take_fastest(prompts, 2 if quick else n_new // 4)
        sides["theirs"] = theirs.greedy

    def turn(side: str) -> Case:
        def case(number: int) -> None:
            texts[side] = sides[side](prompts, n_new)

        return case

    timings = interleave({side: turn(side) for side in sides}, QUICK_ROUNDS if quick else ROUNDS)
    speed = {side: _speed(timings, side, len(prompts) * n_new) for side in sides}
    ratio = None if theirs is None else timings.ratio("theirs", "ours")
    return {
        "ours tokens/s": speed["ours"],
        "peer": "transformers" if theirs is None else theirs.name,
        "peer tokens/s": speed.get("theirs"),
        "ours / peer": ratio,
        "target": TARGET,
        "met": None if ratio is None else ratio.median >= TARGET,
        "same text": None if theirs is None else texts["ours"] == texts["theirs"],
        "rounds": timings.rounds,
        "not measured": None if theirs is not None else HOW_TO_HAVE["transformers"],
    }


def greedy(model: GPT, prompts: Tensor, n_new: int) -> list[list[int]]:
    """The likeliest continuation of each prompt (B, P), token by token: B lists of N."""
    decoding, made = Decoding(model, prompts.tolist()), []
    for _ in range(n_new):
        made.append(likeliest(decoding.next_logits()))
        decoding.append(made[-1], [True] * len(prompts))
    return [list(row) for row in zip(*made, strict=True)]


class Theirs:
    """The class of transformers that a model exports to, with its weights."""

    def __init__(self, model: GPT):
        from nano_moe.export.families import family_of
        from nano_moe.export.hugging_face import as_theirs, quiet

        quiet()
        self.family = family_of(model.config)
        config, self.decoder = as_theirs(model, self.family)
        self.decoder.generation_config.eos_token_id = None
        self.choices = IMPLEMENTATIONS if config.moe is not None else ()
        self.taken = ""

    @property
    def name(self) -> str:
        return f"transformers {self.family}{self.taken and f', {self.taken}'}"

    @torch.no_grad()
    def greedy(self, prompts: Tensor, n_new: int) -> list[list[int]]:
        """As ours."""
        seen = torch.ones_like(prompts)
        drawn = {"do_sample": False, "max_new_tokens": n_new, "pad_token_id": 0}
        whole = self.decoder.generate(prompts, attention_mask=seen, **drawn)
        return whole[:, prompts.shape[1] :].tolist()

    def take_fastest(self, prompts: Tensor, n_new: int) -> None:
        """Leaves it at the implementation of experts that continues these prompts fastest."""
        if not self.choices:
            return

        def so(choice: str) -> Case:
            def case(number: int) -> None:
                self.decoder.set_experts_implementation(choice)
                self.greedy(prompts, n_new)

            return case

        self.taken = interleave({c: so(c) for c in self.choices}, A_LOOK).fastest(self.choices)
        self.decoder.set_experts_implementation(self.taken)


# --- by size -------------------------------------------------------------------------------------


def _by_size(quick: bool) -> Iterator[Row]:
    recipes = {
        name: recipe_file.load(FOLDER / file, QUICK if quick else changes)
        for name, (file, changes, _) in SIZES.items()
    }
    steps = 4 if quick else STEPS
    cases = {name: _steps(_drawn(recipe), steps) for name, recipe in recipes.items()}
    timings = interleave(cases, QUICK_ROUNDS if quick else ROUNDS)
    for name, (_, _, expected) in SIZES.items():
        counted, speed = count(recipes[name]), _speed(timings, name, steps)
        touched = FLOAT32_BYTES * counted.active_params
        over = timings.ratio(SPARSE, name)
        yield {
            "decoder": name,
            "weights, GB": counted.weight_bytes / 1e9,
            "touched, MB": touched / 1e6,
            "tokens/s": speed,
            "GB/s": speed.scaled(touched / 1e9),
            "speed over sparse": over,
            "expected": expected,
            "held": None if expected is None else (over.median < 1) == (expected == "below 1"),
        }


def _steps(model: GPT, n_steps: int) -> Case:
    """Seconds of some further tokens of a prompt of its own."""

    def case(number: int) -> float:
        decoding, token = Decoding(model, [range(number, number + 4)]), 0
        decoding.next_logits()
        start = time.perf_counter()
        for _ in range(n_steps):
            decoding.append([token], [True])
            token = int(decoding.next_logits().argmax())
        return time.perf_counter() - start

    return case


# --- both ----------------------------------------------------------------------------------------


def _drawn(recipe: Recipe) -> GPT:
    return init_weights(GPT(recipe.model), recipe.seed).eval()


def _prompts(recipe: Recipe, n_rows: int, length: int) -> Tensor:  # (B, P)
    generator = torch.Generator().manual_seed(recipe.seed)
    return torch.randint(recipe.model.vocab_size, (n_rows, length), generator=generator)


def _speed(timings: Timings, case: str, n_tokens: int) -> Spread:
    """Tokens per second, slowest first."""
    return Spread.of([n_tokens / seconds for seconds in timings.seconds[case]])
