"""A Hugging Face folder as a run: the way back for the classes that we export to."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nano_moe import recipe_file, runs
from nano_moe.checkpoints import write_weights
from nano_moe.config import DataConfig, ModelConfig, Recipe
from nano_moe.errors import UserError
from nano_moe.export import fast_tokenizer
from nano_moe.export.configs import UNSEEN, fault_of, first_difference, model_of_config
from nano_moe.export.families import FAMILIES, config_of
from nano_moe.export.hugging_face import PROVENANCE, SCHEMA, load, quiet
from nano_moe.export.tensors import check_finite
from nano_moe.export.weights import state_of, traits_of
from nano_moe.files import creating, make_folder, write_text
from nano_moe.model.gpt import GPT
from nano_moe.runs import Run
from nano_moe.text.store import Corpus
from nano_moe.text.tokenizer import FileTokenizer, Tokenizer

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
FIXED = ("byte", "char", "gpt2")  # kinds that do not depend on the text


class Source(NamedTuple):
    """A folder, read and understood, but for the weights' place in our decoder."""

    family: str
    config: Any  # theirs
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    provenance: dict[str, Any] | None  # what an export of ours says of its run


def _said(path: Path) -> dict[str, Any]:
    """What a folder's JSON file says, name by name; raises UserError."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; name a folder of Hugging Face's layout, with config.json and "
            "*.safetensors"
        ) from None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UserError(f"{path}: not JSON with named fields; it is damaged, fetch it again")
    return said


def _config(folder: Path) -> tuple[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds a config.json")
    path = folder / "config.json"
    said = _said(path)
    for field in ("transformers_weights", "num_labels"):  # other files; a name for every label
        if field in said:
            raise UserError(f"{path}: {field}: no field of a language model; delete that line")
    known = {f"{family}ForCausalLM": family for family in FAMILIES}
    named = said.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if not isinstance(architecture, str) or architecture not in known:
        raise UserError(
            f"{path}: architectures: {str(architecture)[:100]} is none that we can be; "
            f"there are {', '.join(known)}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # their validation raises many kinds
        raise UserError(f"{path}: not a config of transformers ({fault_of(error)})") from error
    if type(config).__name__ != f"{known[architecture]}Config":
        raise UserError(f"{path}: model_type {config.model_type} is not of {architecture}")
    return known[architecture], config


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the class, in fp32."""
    if not list(folder.glob("*.safetensors")):
        pickled = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"))]
        held = f"only {pickled[0]}, which is never unpickled" if pickled else "no weights"
        raise UserError(f"{folder}: holds {held}; give a folder with *.safetensors")
    _check_index(folder / "model.safetensors.index.json")
    _check_stored(folder)
    try:
        model, found = load(folder, ignore_mismatched_sizes=True)  # they are told below
    except Exception as error:  # safetensors, json and transformers raise many kinds
        raise UserError(f"{folder}: its weights cannot be read ({fault_of(error)})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(what):
            names = sorted(str(name) for name in found[what])
            raise UserError(
                f"{folder}: {what.replace('_', ' ')}, {len(names)} of them, first {names[0]}; "
                "its weights are not those of its config"
            )
    state = dict(model.state_dict())
    head, embedding = (state[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if model.config.tie_word_embeddings and not torch.equal(head, embedding):
        raise UserError(
            f"{folder}: config.json ties lm_head to the embedding (tie_word_embeddings), and the "
            "weights hold another lm_head; set it to false, or delete that tensor"
        )
    check_finite(state, folder, "import another, it is damaged or diverged")
    return state


def _check_index(path: Path) -> None:
    """Its shards are safetensors of the folder itself: nothing else is read, least of all pickles.

    Raises UserError.
    """
    if not path.is_file():
        return
    shards = _said(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise UserError(f"{path}: weight_map: not names of tensors and files; fetch it again")
    for shard in shards.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{path}: weight_map: {shard[:100]}: only *.safetensors beside it are read"
            )


def _check_stored(folder: Path) -> None:
    """Every tensor is of floating-point numbers, which fp32 holds; raises UserError."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be read ({fault_of(error)}); fetch it again"
            ) from error
        for name, kind in kinds.items():
            if kind not in FLOATS:
                raise UserError(
                    f"{path}: {name}: of {kind}; there are {', '.join(FLOATS)}, quantized weights "
                    "are not imported"
                )


def _provenance(folder: Path) -> dict[str, Any] | None:
    """What an export of ours wrote of its run; None in a foreign folder."""
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    said = _said(path)
    if not isinstance(said.get("schema"), int) or said["schema"] > SCHEMA:
        raise UserError(f"{path}: schema {said.get('schema')}, this version reads {SCHEMA}")
    try:
        said["recipe"] = Recipe.model_validate_json(json.dumps(said["recipe"]))
        said["step"], said["manifest"] = int(said["step"]), dict(said["manifest"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not what an export writes ({fault_of(error)})") from error
    return said


def _tokenizer(folder: Path, provenance: dict[str, Any] | None, rest: Recipe | None) -> Tokenizer:
    """A folder of ours has one of our kinds; elsewhere it is a file, unless `rest` makes the same.

    Raises UserError.
    """
    path = folder / "tokenizer.json"
    if provenance is None:
        wanted = None if rest is None else rest.data.tokenizer
        if wanted not in FIXED:
            return FileTokenizer.read(path)
        with contextlib.suppress(UserError):
            ours = fast_tokenizer.read(path)
            if ours.kind == wanted:
                return ours
        return FileTokenizer.read(path)
    if provenance["recipe"].data.tokenizer == "file":
        return FileTokenizer.read(path)
    return fast_tokenizer.read(path)


def read(folder: Path, rest: Recipe | None = None) -> Source:
    """Config, weights and tokenizer of a folder; raises UserError where one is none of ours.

    `rest` is the recipe that says what a folder from elsewhere does not.
    """
    quiet()
    family, config = _config(folder)
    model_of_config(family, config, UNSEEN, folder / "config.json")
    provenance = _provenance(folder)
    tokenizer = _tokenizer(folder, provenance, rest)
    return Source(family, config, _weights(folder), tokenizer, provenance)


def recipe_of(
    source: Source, rest: Recipe | None, where: Path, *, context: int | None = None
) -> Recipe:
    """The recipe of a folder; raises UserError where its config says more than a recipe can.

    What is not of the model comes from `rest`, else from the run that was exported; a tokenizer
    that is a file's is the folder's own. `context` shortens the config's: what a position is turned
    by depends on it alone, so the first ones compute as before.
    """
    recipe = _whole_recipe(source, rest, where)
    longest = recipe.model.context
    if context is None or context == longest:
        return recipe
    if not 2 <= context < longest:
        raise UserError(
            f"--context {context}: {where / 'config.json'} has max_position_embeddings: "
            f"{longest}; name 2 to {longest}"
        )
    fields = recipe.model.model_dump() | {"context": context}
    try:
        model = ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"--context {context}: {fault_of(error)}") from error
    return recipe.model_copy(update={"model": model})


def _whole_recipe(source: Source, rest: Recipe | None, where: Path) -> Recipe:
    traits = traits_of(source.weights)
    model = model_of_config(source.family, source.config, traits, where / "config.json")
    if source.provenance is None:
        if rest is None:
            raise UserError(
                f"{where}: not exported by nano_moe, so it says nothing of text and training; "
                "name a recipe for these, such as --recipe recipes/base.yaml"
            )
        return rest.model_copy(update={"model": model, "data": _data(source, rest.data, where)})
    exported: Recipe = source.provenance["recipe"]
    difference = first_difference(
        config_of(source.family, exported.model), config_of(source.family, model)
    )
    if difference is not None:
        raise UserError(
            f"{where / PROVENANCE}: its recipe gives another {difference} than config.json; "
            "delete it to go by config.json alone"
        )
    if rest is None:
        return exported
    data = _data(source, rest.data, where)
    return rest.model_copy(update={"model": exported.model, "data": data})


def _data(source: Source, data: DataConfig, place: Path) -> DataConfig:
    """The section with the folder's tokenizer, where that is a file's."""
    if source.tokenizer.kind != "file":
        return data
    return data.model_copy(update={"tokenizer": "file", "tokenizer_file": str(place)})


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.n_vocab:,} ids and its embedding "
            f"{vocab_size:,} rows; the two do not belong together"
        )


def _manifest(
    source: Source, recipe: Recipe, folder: Path, corpus: Corpus | None
) -> dict[str, Any]:
    """The exported run's manifest, or one that says what is known of a foreign folder."""
    said = source.provenance
    imported = {
        "path": str(folder),
        "architecture": f"{source.family}ForCausalLM",
        "run": said["run"] if said else None,
        "step": said["step"] if said else 0,
        "context": source.config.max_position_embeddings,
    }
    if said is not None and corpus is None:
        return said["manifest"] | {"imported": imported}
    assert corpus is not None
    if corpus.tokenizer.pieces != source.tokenizer.pieces:
        raise UserError(
            f"{folder}: its tokenizer has {source.tokenizer.n_vocab:,} ids and is not the one of "
            f"{corpus.path} ({corpus.tokenizer.kind}, {corpus.tokenizer.n_vocab:,}), so nothing "
            "could be evaluated; name a recipe whose data section makes the same tokens"
        )
    described = runs.describe(recipe, corpus=corpus, device="cpu")
    return described | {"imported": imported}


def import_run(
    source: Source, recipe: Recipe, folder: Path, *, name: str, corpus: Corpus | None
) -> Run:
    """A new run folder with the weights as best.ckpt; raises UserError.

    `corpus` is the text that the run of a foreign folder is to be evaluated on.
    """
    runs.check_name_is_free(name)
    _check_vocabulary(source.tokenizer, recipe.model.vocab_size, folder)
    model = GPT(recipe.model)
    try:
        model.load_state_dict(state_of(source.family, recipe.model, source.weights))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: weights of another shape ({fault_of(error)})") from error
    manifest = _manifest(source, recipe, folder, corpus)
    make_folder(runs.ROOT)
    target = Run(runs.ROOT / name)
    data = _data(source, recipe.data, target.tokenizer_file)
    recipe = recipe.model_copy(update={"data": data})
    with creating(target.path) as path:
        path.mkdir()
        run = Run(path)
        write_text(run.recipe_file, recipe_file.dump(recipe))
        source.tokenizer.save(run.tokenizer_file)
        write_weights(run.best, recipe, model, manifest["imported"]["step"])
        runs.write_json(run.manifest_file, manifest)
    return target
