"""`recipes/char.yaml` and its sparse twin against the reference decoder: same text, same budget.

Losses are over the whole validation split. A share is that of the reference's characters at which
a run of ours, its own schedule ending there, is as low; times are shares times the ratio of steps
that alternate within one process.

Shapes: B batch, T time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nano_moe import recipe_file, runs
from nano_moe.bench.bare import BareStep
from nano_moe.bench.recipes import FOLDER, QUICK, prepared, text_of
from nano_moe.bench.reference import Budget, ReferenceStep, score_reference, train_reference
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK as QUICK_TIMING
from nano_moe.bench.timing import Budget as Seconds
from nano_moe.bench.timing import Timings, interleave
from nano_moe.break_even import share_at
from nano_moe.config import DataConfig, Recipe
from nano_moe.text.corpus import documents
from nano_moe.text.store import Corpus
from nano_moe.training.fit import fit
from nano_moe.training.module import Decoder

CHARACTERS = 1_115_394  # as long as the usual character-level benchmark text
REFERENCE, DENSE, SPARSE = "reference", "char", "char-moe"
SHARES = (0.1, 0.2, 0.3)
# Timed and not trained: what of the dense decoder's time is its optimizer's, and its precision's.
TIMED = {"char, AdamW": ("optim.name=adamw",), "char, bf16": ("trainer.precision=bf16",)}
# Aims: nats below the reference, shares of its characters and time, and of its speed.
GAP, MOST_CHARACTERS, MOST_TIME, SPEED = 0.33, 0.3, 0.5, 0.8

NOTES = (
    "reference: GPT-2's shape and AdamW, 4 layers, 12 x 64 characters a step, 2000 steps; see "
    "nano_moe/bench/reference.py.",
    "characters, time: what ours needs of the reference's to end as low.",
    "speed: characters a second over the reference's, optimizers included; char with AdamW and in "
    "bf16 are timed alone, not trained.",
)


def char(quick: bool) -> Report:
    budget = Budget(steps=20, warmup=5) if quick else Budget()
    with tempfile.TemporaryDirectory(prefix="nano-moe-char-") as folder:
        path = Path(folder)
        text = novels(path, CHARACTERS // 20 if quick else CHARACTERS)
        recipes = {name: chosen(name, text, budget, quick) for name in (DENSE, SPARSE)}
        corpus = prepared(recipes[DENSE])
        reference = of_reference(corpus, budget, recipes[DENSE].seed)
        full = {name: train(one, corpus, path) for name, one in recipes.items()}
        shorter = [shortened(recipes[DENSE], share) for share in SHARES]
        early = [train(one, corpus, path) for one in shorter]
        timed = {name: chosen(DENSE, text, budget, quick, *f) for name, f in TIMED.items()}
        seconds = QUICK_TIMING if quick else Seconds(seconds=40)
        timings = speeds({**recipes, **timed}, corpus, budget, seconds)
    rows = table(reference, full, list(zip(SHARES, early, strict=True)), timings)
    return Report("Characters", [*rows], NOTES)


def table(
    reference: float, full: dict[str, float], early: list[tuple[float, float]], timings: Timings
) -> Iterator[Row]:
    """A row per decoder; the sparse one's target is the dense one's loss."""
    share = share_at(reference, [*early, (1.0, full[DENSE])])
    limits = {REFERENCE: None, DENSE: reference - GAP, SPARSE: full[DENSE]}
    for name, limit in limits.items():
        ce, own = full.get(name, reference), share if name == DENSE else None
        time = own and own * timings.ratio(name, REFERENCE).median
        speed = timings.ratio(REFERENCE, name)
        met = limit is not None and ce <= limit
        if name == DENSE:
            met = met and _soon(own, time) and speed.median >= SPEED
        yield {
            "decoder": name,
            "validation CE": ce,
            "at most": limit,
            "characters": own,
            "time": time,
            "speed": speed,
            "met": None if limit is None else met,
            "rounds": timings.rounds,
        }
    for name in (name for name in timings.seconds if name not in limits):
        yield {"decoder": name, "speed": timings.ratio(REFERENCE, name), "rounds": timings.rounds}


def _soon(characters: float | None, time: float | None) -> bool:
    if characters is None or time is None:
        return False
    return characters <= MOST_CHARACTERS and time <= MOST_TIME


def novels(folder: Path, characters: int) -> Path:
    """English novels out of the embedded corpus, as one file."""
    text = ""
    for document in documents(DataConfig(domains=("fiction_en",))):
        text += document.text + "\n\n"
        if len(text) >= characters:
            break
    path = folder / "novels.txt"
    path.write_text(text[:characters], encoding="utf-8")
    return path


def of_reference(corpus: Corpus, budget: Budget, seed: int) -> float:
    """Nats per character that the reference ends at."""
    train, val = _ids(corpus.train.tokens), _ids(corpus.val.tokens)
    model = train_reference(train, corpus.tokenizer.n_vocab, budget, seed)
    return score_reference(model, val, budget)


def train(recipe: Recipe, corpus: Corpus, folder: Path) -> float:
    """Nats per character that a recipe of ours ends at."""
    run = runs.create(recipe, stem="char", root=folder / "checkpoints")
    result = fit(run, recipe, corpus, progress=False)
    assert result.evaluation is not None
    return result.evaluation.overall.ce


def speeds(recipes: dict[str, Recipe], corpus: Corpus, budget: Budget, seconds: Seconds) -> Timings:
    """Steps of all decoders in turns, each on its own batch of the round."""
    train = _ids(corpus.train.tokens)

    def batch(number: int) -> Tensor:  # (B, T + 1)
        return budget.windows(train, torch.Generator().manual_seed(number))

    reference = ReferenceStep(corpus.tokenizer.n_vocab, budget, seed=0)
    ours = {name: BareStep(Decoder(one), batch).run for name, one in recipes.items()}
    return interleave({REFERENCE: lambda number: reference.run(batch(number)), **ours}, seconds)


def chosen(name: str, text: Path, budget: Budget, quick: bool, *fields: str) -> Recipe:
    """A recipe of ours on that text and budget."""
    steps = (f"trainer.steps={budget.steps}", f"optim.warmup_steps={1 if quick else 50}")
    small = [field for field in QUICK if not field.startswith(("model.vocab", "model.context"))]
    every = ("trainer.val_every=1000000", "trainer.save_every=1000000")
    overrides = (*text_of(text), *steps, *every, *(small if quick else ()), *fields)
    recipe = recipe_file.load(FOLDER / f"{name}.yaml", overrides)
    if not quick:
        assert recipe.tokens_per_step == budget.batch * budget.block
    return recipe


def shortened(recipe: Recipe, share: float) -> Recipe:
    """With a schedule that ends after that share of the steps."""
    trainer = recipe.trainer.model_copy(update={"steps": round(share * recipe.trainer.steps)})
    return recipe.model_copy(update={"trainer": trainer})


def _ids(tokens: np.ndarray[Any, Any]) -> Tensor:
    return torch.tensor(tokens.astype("int64"))
