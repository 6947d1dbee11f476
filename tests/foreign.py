"""Tokenizers as public checkpoints have them, trained on a few sentences, and models of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

STORY = [
    "The old fox saw the young hen, and the hen saw the fox; they're 42 years apart.\n",
    "Im Garten sitzt ein Fuchs. Où est la poule? Là-bas, près de la rivière.\n",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))  # 1234567\n",
] * 5
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_WORDS = [f"<0x{byte:02X}>" for byte in range(256)]


def _learned(made: tokenizers.Tokenizer, n: int, first: list[str], **options: Any) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=n, special_tokens=first, show_progress=False, **options
    )
    made.train_from_iterator(STORY, trainer)


def _before(made: tokenizers.Tokenizer, bos: str) -> None:
    tokens = [(bos, made.token_to_id(bos))]
    made.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=tokens
    )


def _of_characters(scheme: str | None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    made.decoder = decoders.Sequence(steps)
    _learned(made, 420, ["<unk>", "<s>", "</s>", *BYTE_WORDS])
    saved = json.loads(made.to_str())  # the bytes are words like others
    saved["added_tokens"] = saved["added_tokens"][:3]
    made = tokenizers.Tokenizer.from_str(json.dumps(saved))
    _before(made, "<s>")
    return made


def _of_bytes(pattern: str | None, n: int, first: list[str], **options: Any) -> Any:
    made = tokenizers.Tokenizer(models.BPE(**options))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level]) if cut else byte_level
    made.decoder = decoders.ByteLevel()
    _learned(made, n, first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return made


def llama2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    return _of_characters(None), {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def metaspace(scheme: str = "first") -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    return _of_characters(scheme), {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
    }


def llama3() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    made = _of_bytes(LLAMA3, 330, [], ignore_merges=True)
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    _before(made, "<|begin_of_text|>")
    return made, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def qwen() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    made = _of_bytes(QWEN, 330, [])
    made.normalizer = normalizers.NFC()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made, {"bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": False}


def neox() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    made = _of_bytes(None, 330, ["<|endoftext|>", "<|padding|>"])
    made.add_tokens([AddedToken(" " * n, normalized=True) for n in (8, 6, 4, 3)])
    return made, {"eos_token": "<|endoftext|>"}


def deepseek() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    made = _of_bytes(LLAMA3, 330, [])
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    made.add_special_tokens(names)
    made.add_tokens([AddedToken("<｜User｜>", normalized=False)])
    return made, {"bos_token": names[0], "eos_token": names[1], "add_bos_token": True}


STYLES = {
    "llama 2": llama2,
    "metaspace": metaspace,
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "llama 3": llama3,
    "qwen": qwen,
    "neox": neox,
    "deepseek": deepseek,
}


def write(style: str, folder: Path) -> Path:
    """The tokenizer.json of a style in a folder, and its names beside it."""
    folder.mkdir(exist_ok=True)
    made, names = STYLES[style]()
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder / "tokenizer.json"


SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (transformers.LlamaConfig, {}),
    "Qwen3": (transformers.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "Mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Qwen3Moe": (
        transformers.Qwen3MoeConfig,
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"norm_topk_prob": True, "head_dim": 8},
        },
    ),
    "DeepseekV3": (
        transformers.DeepseekV3Config,
        {
            **LATENT,
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None},
            **{"num_key_value_heads": 4, "n_shared_experts": 1, "rope_interleave": True},
        },
    ),
}


def checkpoint(family: str, style: str, folder: Path) -> Path:
    """A folder with a drawn model of the class and a tokenizer of the style."""
    write(style, folder)
    kind, fields = CLASSES[family]
    torch.manual_seed(0)
    config = kind(**{**SIZES, **fields}, bos_token_id=None, eos_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.generation_config = transformers.GenerationConfig()
    theirs.save_pretrained(folder)
    return folder
