"""A run as a Hugging Face folder that `AutoModelForCausalLM` loads and computes the same with.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from nano_moe import checkpoints, runs
from nano_moe.config import ModelConfig, Recipe
from nano_moe.export import fast_tokenizer
from nano_moe.export.card import Exported, model_card
from nano_moe.export.families import FAMILIES, family_of, model_of
from nano_moe.export.tensors import RETRAIN, check_finite, without_training
from nano_moe.export.weights import weights_of
from nano_moe.files import creating
from nano_moe.model.gpt import GPT
from nano_moe.runs import Run
from nano_moe.text.tokenizer import Tokenizer, load_for

PROVENANCE = "nano_moe.json"
SCHEMA = 1  # of that file
TOLERANCE = 1e-4  # of logits
ALIGNED = 8  # widths that grouped products want a multiple of


class Result(NamedTuple):
    """What was written, and how far its logits were from ours."""

    path: Path
    architecture: str
    step: int
    difference: float
    notes: list[str]


def export(run: Run, target: Path) -> Result:
    """Write a run's best weights as a new folder, checked by loading it; raises UserError.

    The folder appears under its name when it is whole, or not at all.
    """
    quiet()
    recipe = run.recipe()
    family = family_of(recipe.model)
    with creating(target) as folder:
        folder.mkdir()
        _, model, step = checkpoints.load_model(run)
        check_finite(model.state_dict(), run.path, RETRAIN)
        tokenizer = load_for(run.tokenizer_file, recipe.model.vocab_size)
        notes = _notes(family, recipe.model)
        config, theirs = as_theirs(model, family, **_ids(tokenizer))
        theirs.generation_config = _generation(tokenizer, config)
        _save(theirs, folder)
        fast_tokenizer.write(tokenizer, config.context, folder)
        options = loading_options(config)
        tokens = _tokens(tokenizer.n_vocab, config.context)
        difference = _difference(model, folder, tokens, options)
        written = Exported(
            architecture=type(theirs).__name__,
            difference=difference,
            tokens=tokens.numel(),
            tokenizer=_said_of(tokenizer),
            options=options,
            notes=[f"\n{note}" for note in notes],
        )
        card = model_card(run, recipe, step, written)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for weights in folder.glob("*.safetensors"):  # written for their owner alone
            weights.chmod((folder / "README.md").stat().st_mode)
        runs.write_json(folder / PROVENANCE, _provenance(run, recipe, config, step))
    return Result(target, written.architecture, step, difference, notes)


def _save(theirs: Any, folder: Path) -> None:
    try:
        theirs.save_pretrained(folder)
    except SafetensorError as error:  # as safetensors reports a full disk
        raise OSError(str(error).splitlines()[0]) from error


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` must be told: grouped products cannot do widths like 12 everywhere."""
    if config.moe is None:
        return {}
    aligned = config.d_model % ALIGNED == 0 and config.expert_width % ALIGNED == 0
    return {} if aligned else {"experts_implementation": "eager"}


def load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A folder's model in fp32 on the CPU, and which of its tensors did not find their place."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return loaded


def quiet() -> None:
    """Our own output says what their notes and progress bars would."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def as_theirs(model: GPT, family: str, **fields: Any) -> tuple[ModelConfig, Any]:
    """Their model of a family with our weights, and the recipe of what it computes.

    `fields` are added to their config.
    """
    scales, state = FAMILIES[family].scales, model.state_dict()
    config, state = without_training(model.config, state, scales=scales)
    theirs = model_of(family, config, **fields)
    theirs.load_state_dict(weights_of(family, config, state))
    return config, theirs


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What their configs say of our end token, and of all that end a text."""
    end, stops = tokenizer.end_id, list(tokenizer.stop_ids)
    eos = stops if len(stops) > 1 else stops[0]
    return {"bos_token_id": end, "eos_token_id": eos, "pad_token_id": end}


def _generation(tokenizer: Tokenizer, config: ModelConfig) -> transformers.GenerationConfig:
    unused = list(range(tokenizer.n_vocab, config.vocab_size))
    return transformers.GenerationConfig(**_ids(tokenizer), suppress_tokens=unused or None)


def _said_of(tokenizer: Tokenizer) -> str:
    """A sentence for the card."""
    said = f"The tokenizer ({tokenizer.kind}, {tokenizer.n_vocab:,} ids)"
    if tokenizer.kind == "file":
        end = tokenizer.special[tokenizer.end_id]
        return f"{said} is that of the imported folder; in training, {end} parts the texts."
    return f"{said} puts the end-of-document token before every text, as in training."


def _tokens(n_vocab: int, context: int) -> Tensor:
    """(8, T) drawn tokens, with a seed of their own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, n_vocab, (8, min(context, 256)), generator=generator)


@torch.no_grad()
def _difference(model: GPT, folder: Path, tokens: Tensor, options: dict[str, Any]) -> float:
    """The largest difference of logits; raises RuntimeError where more than near ties differ.

    One token in a hundred may: where two experts score alike, rounding decides between them.
    """
    theirs, _ = load(folder, **options)
    gaps = (model(tokens)[0] - theirs.eval()(tokens).logits).abs().amax(-1)  # (B, T)
    if (~(gaps <= TOLERANCE)).float().mean() > 0.01:  # so that NaN differs, too
        raise RuntimeError(f"the exported model's logits differ by {gaps.max():.1e}; not written")
    return gaps.max().item()


def _notes(family: str, config: ModelConfig) -> list[str]:
    """What the exported weights are besides the run's own."""
    notes = []
    moe = config.moe
    if family == "Qwen3Next":
        notes.append(
            "The class gates attention and the shared expert; gates of 0 (a half) stand before "
            "doubled projections, so nothing is gated that the run does not gate."
        )
    if family == "Qwen2Moe" and moe is not None and not moe.shared_expert_gate:
        notes.append(
            "The class gates a shared expert; its gate is 0 (a half), before a doubled projection."
            if moe.n_shared_experts
            else "The class has a shared expert; it is of width 1 and zero."
        )
    if moe is not None and moe.per_expert_scale:
        notes.append("Each expert's learned factor is multiplied into its down-projection.")
    if moe is not None and moe.routed_scaling_factor != 1 and not FAMILIES[family].scales:
        notes.append("The routed scaling factor is multiplied into the down-projections.")
    if moe is not None and moe.noisy_top_k:
        notes.append("The router's noise, which only training adds, is left out.")
    return notes


def _provenance(run: Run, recipe: Recipe, config: ModelConfig, step: int) -> dict[str, Any]:
    exported = recipe.model_copy(update={"model": config})
    return {
        "schema": SCHEMA,
        "run": run.name,
        "step": step,
        "recipe": exported.model_dump(mode="json"),
        "manifest": run.manifest(),
    }
