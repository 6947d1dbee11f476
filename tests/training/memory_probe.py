"""Train a recipe, given as JSON, in this process; print what memory it held before and at most.

Before means after the imports and a training of the same kind in miniature, which compiles the
kernels. Beside it, how many products oneDNN compiled for experts. Linux only: the resident set is
read from /proc.
"""

import json
import random
import re
import string
import sys
from pathlib import Path

from nano_moe import runs
from nano_moe.config import Recipe
from nano_moe.footprint import PRODUCTS
from nano_moe.model import fused
from nano_moe.text.store import prepare
from nano_moe.training.fit import fit

SHAPES: set[tuple[int, int]] = set()  # experts and rows of each kind of chunk


def train(recipe: Recipe, name: str) -> None:
    corpus = prepare(recipe.data, recipe.model.vocab_size, recipe.model.context, progress=False)
    fit(runs.create(recipe, stem=name, name=name), recipe, corpus, progress=False)


def miniature(recipe: Recipe) -> Recipe:
    moe = recipe.model.moe and recipe.model.moe.model_copy(update={"d_expert": 8})
    sizes = {"context": 16, "n_layers": 2, "d_model": 64, "d_ff": 64, "moe": moe}
    model = recipe.model.model_copy(update=sizes)
    trainer = recipe.trainer.model_copy(update={"batch_size": 2, "steps": 1})
    return recipe.model_copy(update={"model": model, "trainer": trainer})


def watch_chunks() -> None:
    lay_out = fused.lay_out

    def watched(*arguments):
        layout = lay_out(*arguments)
        SHAPES.update((chunk.last - chunk.first, chunk.rows) for chunk in layout.chunks)
        return layout

    fused.lay_out = watched


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most so far)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    draw = random.Random(0)
    Path("text.txt").write_text("".join(draw.choices(string.printable, k=200_000)))
    recipe = Recipe.model_validate_json(sys.argv[1])
    train(miniature(recipe), "miniature")
    idle = resident("VmRSS")
    watch_chunks()
    train(recipe, "large")
    bf16 = recipe.trainer.precision == "bf16"
    compiled = PRODUCTS * len(SHAPES) if bf16 else 0
    print(json.dumps({"idle": idle, "peak": resident("VmHWM"), "compiled": compiled}))
