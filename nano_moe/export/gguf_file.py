"""A run as a GGUF file that llama.cpp computes the same with.

Shapes: D d_model, E experts, F hidden width, H heads, L width of the latent of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from nano_moe import checkpoints
from nano_moe.config import ModelConfig, Recipe
from nano_moe.errors import UserError
from nano_moe.export import demands
from nano_moe.export.demands import ANY_ROUTER, SWIGLU, Target, choose
from nano_moe.export.pieces import END, check_pieces, merges_of, spelt
from nano_moe.export.tensors import RETRAIN, Tensors, check_finite, interleaved, without_training
from nano_moe.files import creating
from nano_moe.runs import Run
from nano_moe.text.tokenizer import Tokenizer, load_for

_ROUTED = (*ANY_ROUTER, demands.EVERY_LAYER, demands.UNGATED, demands.GROUPS_BY_TWO)

# In order of preference. What llama.cpp does with each architecture, whatever a file says:
# llama always divides the chosen weights by their sum, qwen2moe never does.
ARCHITECTURES = [
    Target("llama", False, False, (SWIGLU, demands.PLAIN_HEADS)),
    Target("qwen3", False, False, (SWIGLU, demands.NORMED_HEADS)),
    Target(
        "llama",
        False,
        True,
        (
            *demands.UNBIASED,
            demands.PLAIN_HEADS,
            demands.NO_SHARED,
            demands.NORMALIZED,
            demands.ALL_LAYERS_SPARSE,
        ),
    ),
    Target("glm4moe", False, True, _ROUTED),
    Target(
        "qwen2moe",
        False,
        True,
        (
            *demands.UNBIASED,
            demands.PLAIN_HEADS,
            demands.GATED,
            demands.NOT_NORMALIZED,
            demands.ALL_LAYERS_SPARSE,
        ),
    ),
    Target("deepseek2", True, False, (SWIGLU, demands.NOT_AS_DEEP_AS_LITE)),
    Target("deepseek2", True, True, (*_ROUTED, demands.NOT_AS_DEEP_AS_LITE)),
]
PAIRED = ("llama",)  # turn neighbouring pairs of a head's rows, not its halves
SCALES = ("glm4moe", "deepseek2")  # multiply weights by a factor
WHOLE_HEAD = ("qwen2moe",)  # want the head as a tensor of its own, tied or not
QUANTS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "experts-q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "experts-q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
EXPERTS_ALONE = "experts-"  # begins kinds that leave all else in f32
EXPERTS = ("_exps.", "_shexp.")  # in the names of experts' tensors
NEVER = f"{END} {END}"  # no text begins with such pieces; llama.cpp wants a merge, if only this one
F16 = 65504.0  # the largest
LARGEST = {  # number that a kind can hold: in blocks, by their f16 scale
    GGMLQuantizationType.F16: F16,
    GGMLQuantizationType.Q8_0: 127 * F16,
    GGMLQuantizationType.Q4_0: 8 * F16,
}
BLOCK = 32  # numbers that q8_0 and q4_0 store together; rows are whole blocks


class Result(NamedTuple):
    """What was written."""

    path: Path
    architecture: str
    step: int
    n_bytes: int
    notes: list[str]


def architecture_of(config: ModelConfig) -> str:
    """The architecture that computes what a recipe does; raises UserError with the nearest."""
    return choose(ARCHITECTURES, config, "GGUF architecture of llama.cpp").name


def export(run: Run, target: Path, quant: str) -> Result:
    """Write a run's best weights as a new file, which is whole or absent; raises UserError."""
    recipe = run.recipe()
    arch = architecture_of(recipe.model)
    if quant.startswith(EXPERTS_ALONE):
        check_experts(recipe.model)
    with creating(target) as path:
        _, model, step = checkpoints.load_model(run)
        check_finite(model.state_dict(), run.path, RETRAIN)
        tokenizer = load_for(run.tokenizer_file, recipe.model.vocab_size)
        check_tokenizer(tokenizer)
        config, state = without_training(recipe.model, model.state_dict(), scales=arch in SCALES)
        tensors = dict(tensors_of(arch, config, state))
        kept = write(path, arch, config, tensors, tokenizer, name=run.name, quant=quant)
        size = path.stat().st_size
    return Result(target, arch, step, size, _notes(arch, recipe, kept))


def check_experts(config: ModelConfig) -> None:
    """Raises UserError where there are no experts, or their rows are no whole blocks."""
    if config.moe is None:
        raise UserError("model.moe=null: a dense run has no experts to quantize; give a sparse one")
    widths = {"d_model": config.d_model, "moe.d_expert": config.expert_width}
    for name, width in widths.items():
        if width % BLOCK:
            raise UserError(
                f"model.{name}={width}: experts are quantized in blocks of {BLOCK} numbers of a "
                f"row, and {width} is no multiple of it; train with one that is"
            )


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises UserError for one of characters or of a file: llama.cpp knows words by name alone."""
    if tokenizer.kind == "file":
        raise UserError(
            "the run's tokenizer is a file's, and GGUF knows rules for words by name alone; export "
            "it with --to hf, and convert that with llama.cpp's own script"
        )
    if tokenizer.kind == "char":
        raise UserError(
            "the run's tokenizer is of characters, and llama.cpp has none such; export it with "
            "--to hf, or train with data.tokenizer=bpe or byte"
        )
    check_pieces(tokenizer)


def tensors_of(arch: str, config: ModelConfig, state: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, by name, in llama.cpp's layout."""
    yield "token_embd.weight", state["embedding.weight"]
    yield "output_norm.weight", state["norm.weight"]
    if not config.tie_embeddings or arch in WHOLE_HEAD:
        yield "output.weight", state["head.weight"]
    for layer in range(config.n_layers):
        prefix = f"blocks.{layer}."
        block = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        for name, tensor in _block(arch, config, block, config.is_sparse(layer)):
            yield f"blk.{layer}.{name}", tensor


def _block(
    arch: str, config: ModelConfig, block: Tensors, sparse: bool
) -> Iterator[tuple[str, Tensor]]:
    norm = "post_attention_norm" if arch == "glm4moe" else "ffn_norm"
    yield "attn_norm.weight", block["attention_norm.weight"]
    yield f"{norm}.weight", block["ffn_norm.weight"]
    yield "attn_output.weight", block["attention.o_proj.weight"]
    yield from _attention(arch, config, block) if config.mla is None else _latent(config, block)
    if not sparse:
        yield from _gated("ffn_{}.weight", block["ffn.gate_up.weight"], block["ffn.down.weight"])
        return
    yield "ffn_gate_inp.weight", block["ffn.router.weight"]
    yield from _gated("ffn_{}_exps.weight", block["ffn.experts.gate_up"], block["ffn.experts.down"])
    if arch in SCALES:
        bias = block.get("ffn.router.expert_bias")
        none = torch.zeros(len(block["ffn.router.weight"]))
        yield "exp_probs_b.bias", none if bias is None else bias
    yield from _shared(arch, config, block)


def _attention(arch: str, config: ModelConfig, block: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, n_heads in (("q", config.n_heads), ("k", config.kv_heads), ("v", None)):
        rows = block[f"attention.{name}_proj.weight"]
        if n_heads is not None and arch in PAIRED:
            rows = rows[interleaved(config.head_size, config.head_size, n_heads)]
        yield f"attn_{name}.weight", rows
        if n_heads is not None and config.qk_norm:
            yield f"attn_{name}_norm.weight", block[f"attention.{name}_norm.weight"]


def _latent(config: ModelConfig, block: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Keys' half of the second projection turned around, as llama.cpp puts it into the queries."""
    mla = config.mla
    assert mla is not None
    nope, turned = mla.qk_nope_head_dim, mla.qk_rope_head_dim
    queries = interleaved(nope + turned, turned, config.n_heads)
    keys = interleaved(mla.kv_lora_rank + turned, turned)
    if mla.q_lora_rank is None:
        yield "attn_q.weight", block["attention.q_proj.weight"][queries]
    else:
        yield "attn_q_a.weight", block["attention.q_a_proj.weight"]
        yield "attn_q_a_norm.weight", block["attention.q_a_norm.weight"]
        yield "attn_q_b.weight", block["attention.q_b_proj.weight"][queries]
    yield "attn_kv_a_mqa.weight", block["attention.kv_a_proj.weight"][keys]
    yield "attn_kv_a_norm.weight", block["attention.kv_a_norm.weight"]
    both = block["attention.kv_b_proj.weight"].unflatten(0, (config.n_heads, -1))  # (H, C + V, L)
    k_b, v_b = both.split([nope, mla.v_head_dim], dim=1)
    yield "attn_k_b.weight", k_b.mT  # (H, L, C)
    yield "attn_v_b.weight", v_b


def _gated(name: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2, dim=-2)
    yield from ((name.format(part), t) for part, t in (("gate", gate), ("up", up), ("down", down)))


def _shared(arch: str, config: ModelConfig, block: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The shared experts; zeros where the architecture has one and the recipe has not."""
    if "ffn.shared_gate.weight" in block:
        yield "ffn_gate_inp_shexp.weight", block["ffn.shared_gate.weight"].flatten()
    if "ffn.shared.down.weight" in block:
        gate_up, down = block["ffn.shared.gate_up.weight"], block["ffn.shared.down.weight"]
    elif arch in SCALES:
        down = torch.zeros(config.d_model, config.expert_width)
        gate_up = torch.zeros(2 * config.expert_width, config.d_model)
    else:
        return
    yield from _gated("ffn_{}_shexp.weight", gate_up, down)


def write(
    path: Path,
    arch: str,
    config: ModelConfig,
    tensors: Tensors,
    tokenizer: Tokenizer,
    *,
    name: str,
    quant: str,
) -> list[str]:
    """Write a file; the names of tensors that are stored in f16 because rows are no whole blocks.

    Raises OSError when the disk refuses.
    """
    kind, file_type = QUANTS[quant]
    writer = GGUFWriter(path, arch)
    kept = []
    try:
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, arch, config)
        _add_vocabulary(writer, tokenizer, config.vocab_size)
        for tensor_name, tensor in tensors.items():
            stored = storage(tensor_name, tuple(tensor.shape), quant)
            if stored != kind and stored == GGMLQuantizationType.F16:
                kept.append(tensor_name)
            writer.add_tensor(tensor_name, rounded(tensor_name, tensor, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return kept


def rounded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """As it is stored; raises UserError where a number, or a block's f16 scale, would overflow."""
    rows = np.ascontiguousarray(tensor.float().cpu().numpy(), np.float32)
    largest = float(np.abs(rows).max(initial=0))
    if largest > LARGEST.get(kind, np.inf):
        raise UserError(
            f"{name}: holds {largest:.3g}, and {kind.name} no more than {LARGEST[kind]:.3g}; "
            "write it in f32"
        )
    return gguf.quantize(rows, kind)


def storage(name: str, shape: tuple[int, ...], quant: str) -> GGMLQuantizationType:
    """How a tensor is stored in a file of a kind, as llama.cpp's quantizer does.

    Vectors and routers stay in f32, embeddings and head in q8_0 at least, and rows that are no
    whole blocks in f16; of the kinds that are of experts alone, all else stays in f32.
    """
    kind, _ = QUANTS[quant]
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    if quant.startswith(EXPERTS_ALONE) and not any(part in name for part in EXPERTS):
        return GGMLQuantizationType.F32
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return kind
    if shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0 if name in ("token_embd.weight", "output.weight") else kind


def _describe(writer: GGUFWriter, arch: str, config: ModelConfig) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff if arch != "llama" else _hidden(config))
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rope_size)
    writer.add_vocab_size(config.vocab_size)
    if config.mla is None:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    else:
        _describe_latent(writer, config)
    if config.moe is not None:
        _describe_experts(writer, arch, config)


def _hidden(config: ModelConfig) -> int:
    return config.d_ff if config.moe is None else config.expert_width


def _describe_latent(writer: GGUFWriter, config: ModelConfig) -> None:
    """To llama.cpp all heads share one key, the latent and its rotated part."""
    mla = config.mla
    assert mla is not None
    writer.add_head_count_kv(1)
    writer.add_key_length(mla.kv_lora_rank + mla.qk_rope_head_dim)
    writer.add_value_length(mla.kv_lora_rank)
    writer.add_key_length_mla(mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    writer.add_value_length_mla(mla.v_head_dim)
    writer.add_kv_lora_rank(mla.kv_lora_rank)
    writer.add_q_lora_rank(mla.q_lora_rank or 0)
    if config.moe is None:
        writer.add_leading_dense_block_count(config.n_layers)
        writer.add_expert_feed_forward_length(0)
        writer.add_expert_shared_count(0)


def _describe_experts(writer: GGUFWriter, arch: str, config: ModelConfig) -> None:
    moe = config.moe
    assert moe is not None
    writer.add_expert_count(moe.n_experts)
    writer.add_expert_used_count(moe.top_k)
    if arch == "llama":
        return
    writer.add_expert_feed_forward_length(config.expert_width)
    if arch == "qwen2moe":
        width = moe.n_shared_experts * config.expert_width
        writer.add_expert_shared_feed_forward_length(width)
        return
    sigmoid = moe.score == "sigmoid"
    functions = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(functions.SIGMOID if sigmoid else functions.SOFTMAX)
    writer.add_expert_shared_count(max(1, moe.n_shared_experts))
    writer.add_expert_weights_norm(moe.normalizes)
    writer.add_expert_weights_scale(moe.routed_scaling_factor)
    writer.add_leading_dense_block_count(moe.first_k_dense)
    if moe.n_groups > 1:
        writer.add_expert_group_count(moe.n_groups)
        writer.add_expert_group_used_count(moe.top_k_groups)


def _add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """GPT-2's kind of vocabulary, merges and words; rows that no text reaches are named unused."""
    pieces = tokenizer.pieces[:-1]
    unused = [f"<|unused{i}|>" for i in range(vocab_size - tokenizer.n_vocab)]
    kinds = gguf.TokenType
    types = [kinds.NORMAL] * len(pieces) + [kinds.CONTROL] + [kinds.UNUSED] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*map(spelt, pieces), END, *unused])
    writer.add_token_types(types)
    merges = [f"{spelt(a)} {spelt(b)}" for a, b in merges_of(pieces)]
    writer.add_token_merges(merges or [NEVER])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.end_id)
    writer.add_add_bos_token(True)


def _notes(arch: str, recipe: Recipe, kept: list[str]) -> list[str]:
    notes = []
    moe = recipe.model.moe
    if arch in SCALES and moe is not None and not moe.n_shared_experts:
        notes.append(f"{arch} has a shared expert; it is as wide as another, and zero.")
    if kept:
        notes.append(
            f"{len(kept)} tensors are stored in f16, their rows being no multiple of {BLOCK}: "
            f"{kept[0]} and others."
        )
    return notes
