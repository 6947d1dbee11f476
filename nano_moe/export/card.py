"""The model card: what was exported, how to load it, its figures and its recipe."""

from __future__ import annotations

import csv
from typing import Any, NamedTuple

from nano_moe import recipe_file
from nano_moe.accounting import count
from nano_moe.config import Recipe
from nano_moe.runs import Run

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nano_moe, {kind}]
---

# {name}

A small {what} trained with nano_moe: {total:,} parameters, {active:,} of which one token meets.
The class `{architecture}` computes what the run does: over {tokens:,} random tokens their logits
differed by {difference:.1e} at most.{notes}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER{options})
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=100)[0]))
```

{tokenizer}
Contexts are at most {context:,} tokens. It continues text and follows no instructions; nothing was
done about what its training text says.

| figure | value |
|---|---|
| validation cross-entropy | {ce} |
| validation bits per byte | {bpb} |
| trained on | {seen:,} tokens ({step:,} of {steps:,} steps), seed {seed} |
| text | {text} |
| corpus | sha256 {corpus} |
| source | nano_moe commit {commit} |

`nano_moe.json` lets `nano-moe import` make a run of this folder again. The recipe, resolved:

```yaml
{recipe}```
"""


TERMS = {  # of embedded domains that ask for something
    "encyclopedia_en": "encyclopedia_en by Wikipedia's contributors, CC BY-SA 4.0",
    "encyclopedia_es": "encyclopedia_es by Wikipedia's contributors, CC BY-SA 4.0",
    "code_python": "code_python by PyTorch's contributors, BSD-3-Clause",
}


class Exported(NamedTuple):
    """What is said of an export besides its run."""

    architecture: str
    difference: float  # largest of the logits
    tokens: int  # that they were compared over
    tokenizer: str  # a sentence on it
    options: dict[str, Any]  # that loading needs
    notes: list[str]


def model_card(run: Run, recipe: Recipe, step: int, exported: Exported) -> str:
    """The README.md of an exported folder."""
    counted, manifest = count(recipe), run.manifest()
    sparse = recipe.model.moe is not None
    scored = figures(run, step)
    options = "".join(f", {name}={value!r}" for name, value in exported.options.items())
    return CARD.format(
        kind="mixture-of-experts" if sparse else "dense",
        name=run.name,
        what="mixture of experts" if sparse else "dense decoder",
        total=counted.total_params,
        active=counted.active_params,
        **exported._asdict() | {"options": options, "notes": "".join(exported.notes)},
        context=recipe.model.context,
        ce="not measured" if scored is None else f"{scored['val/ce']:.4f} nats per token",
        bpb="not measured" if scored is None else f"{scored['val/bpb']:.4f}",
        seen=step * recipe.tokens_per_step,
        step=step,
        steps=recipe.trainer.steps,
        seed=recipe.seed,
        text=text_of(recipe),
        corpus=manifest.get("corpus", {}).get("sha256"),
        commit=manifest.get("git_commit"),
        recipe=recipe_file.dump(recipe),
    )


def text_of(recipe: Recipe) -> str:
    """What the recipe reads, and the terms that whoever publishes the model should pass on."""
    data = recipe.data
    if data.hub is not None:
        return f"the dataset {data.hub.dataset}"
    if not data.domains:
        return "files of the user's own"
    terms = [said for domain, said in TERMS.items() if domain in data.domains]
    return "; ".join([f"{', '.join(data.domains)} (sources: data/README.md of nano_moe)", *terms])


def figures(run: Run, step: int) -> dict[str, float] | None:
    """The validation that metrics.csv holds of a step; None where there is none."""
    try:
        with open(run.metrics_file, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step") == str(step)]
        return {name: float(rows[-1][name]) for name in ("val/ce", "val/bpb")}
    except (OSError, LookupError, ValueError, TypeError, csv.Error):
        return None
