"""GGUF files: what llama.cpp makes of them, and how weights are stored."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from export_cases import GGUF_HELD, SIZES, config_of_case, drawn
from gguf import GGMLQuantizationType

from nano_moe import checkpoints, runs
from nano_moe.cli.main import main
from nano_moe.config import ModelConfig
from nano_moe.errors import UserError
from nano_moe.export.gguf_file import (
    SCALES,
    architecture_of,
    export,
    rounded,
    storage,
    tensors_of,
    write,
)
from nano_moe.export.quantized import with_quantized_experts
from nano_moe.export.tensors import without_training
from nano_moe.model.gpt import GPT
from nano_moe.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

SPOKEN = range(32, 127)  # what greedy decoding may choose: bytes that are characters by themselves


class Llama:
    """llama.cpp in this process, with keys and values in fp32."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip(
            "xllamacpp", reason="llama.cpp: pip install --editable '.[gguf-test]'"
        )
        params, fp32 = xllamacpp.CommonParams(), xllamacpp.ggml_type.GGML_TYPE_F32
        params.model.path = str(path)
        params.n_ctx = params.n_batch = params.n_ubatch = SIZES["context"]
        params.n_parallel = params.cpuparams.n_threads = 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = fp32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str | list[int], n: int, vocab_size: int) -> dict:
        """What follows a prompt, greedily, with log-probabilities of the whole vocabulary."""
        silent = [[i, False] for i in range(vocab_size) if i not in SPOKEN]
        settings = {"temperature": 0, "logprobs": vocab_size, "logit_bias": silent}
        return self.server.handle_completions(
            {"prompt": prompt, "max_tokens": n, "cache_prompt": False, **settings}
        )

    def steps(self, prompt: list[int], n: int, vocab_size: int) -> list[tuple[int, torch.Tensor]]:
        """Per new token its id, and (V,) log-probabilities."""
        found = self.complete(prompt, n, vocab_size)["choices"][0]["logprobs"]["content"]
        steps = []
        for step in found:
            row = torch.full((vocab_size,), math.nan)
            for entry in step["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
            steps.append((step["id"], row))
        return steps


def written(path: Path, config: ModelConfig, quant: str, tokenizer=None) -> GPT:
    """A file of drawn weights, and the model that they are of."""
    model, arch = drawn(GPT(config)), architecture_of(config)
    left, state = without_training(config, model.state_dict(), scales=arch in SCALES)
    tensors = dict(tensors_of(arch, left, state))
    write(path, arch, left, tensors, tokenizer or ByteTokenizer(), name="drawn", quant=quant)
    return model


@pytest.mark.parametrize("case", GGUF_HELD)
@torch.no_grad()
def test_llama_cpp_computes_and_continues_as_we_do(tmp_path, case):
    config = config_of_case(case)
    model = written(tmp_path / "model.gguf", config, "f32")
    ids = torch.randint(0, 256, (25,), generator=torch.Generator().manual_seed(2)).tolist()
    steps = Llama(tmp_path / "model.gguf").steps(ids, 8, config.vocab_size)
    assert len(steps) == 8
    for token, theirs in steps:
        ours = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
        assert (ours - theirs).abs().max() < 2e-5  # also where one is missing, which is NaN
        spoken = ours[SPOKEN.start : SPOKEN.stop]
        assert token == SPOKEN.start + spoken.argmax()
        ids.append(token)


@torch.no_grad()
def test_llama_cpp_reads_a_file_of_quantized_experts(tmp_path):
    """It rounds activations to 8 bits, too, so that it comes near and no nearer."""
    config = config_of_case("sparse")
    moe = config.moe.model_copy(update={"d_expert": 32})
    config = config.model_copy(update={"moe": moe})
    model = with_quantized_experts(written(tmp_path / "model.gguf", config, "experts-q4_0"), "q4_0")
    ids = torch.randint(0, 256, (25,), generator=torch.Generator().manual_seed(2)).tolist()
    ((_, theirs),) = Llama(tmp_path / "model.gguf").steps(ids, 1, config.vocab_size)
    off = (model(torch.tensor([ids]))[0][0, -1].log_softmax(-1) - theirs).abs().mean()
    assert off < 0.05


def test_llama_cpp_cuts_text_as_we_do(tmp_path):
    texts = [
        "the cat sat on the mat; don't!",
        "  naïve\n\n\tcafé 日本 👩‍👩‍👧 123",
        "def f(x):\n    pass",
    ]
    tokenizer = BPETokenizer.train([" ".join(texts) * 20], 300)
    config = ModelConfig(**SIZES | {"vocab_size": 304})
    model = written(tmp_path / "model.gguf", config, "f32", tokenizer)
    llama = Llama(tmp_path / "model.gguf")
    for text in texts:
        ids = [tokenizer.end_id, *tokenizer.encode(text)]
        found = llama.complete(text, 1, config.vocab_size)
        assert found["usage"]["prompt_tokens"] == len(ids)
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
        (step,) = found["choices"][0]["logprobs"]["content"]
        for entry in step["top_logprobs"]:
            assert entry["logprob"] == pytest.approx(ours[entry["id"]].item(), abs=2e-5)


@pytest.mark.parametrize("quant, error", [("f32", 0), ("f16", 5e-4), ("q8_0", 0.01), ("q4_0", 0.1)])
def test_weights_are_stored_as_asked(tmp_path, quant, error):
    config = config_of_case("normed, shared")  # heads of 8, experts of 24: no whole blocks
    path = tmp_path / "model.gguf"
    model = written(path, config, quant)
    arch = architecture_of(config)
    wanted = dict(tensors_of(arch, *without_training(config, model.state_dict(), scales=True)))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert stored.keys() == wanted.keys()
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in stored.items()}
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "f32"
    assert kinds["output_norm.weight"] == "f32"
    assert kinds["blk.0.attn_q.weight"] == quant
    assert kinds["blk.1.ffn_down_exps.weight"] == (quant if quant in ("f32", "f16") else "f16")
    assert kinds["token_embd.weight"] == ("q8_0" if quant == "q4_0" else quant)
    for name, tensor in stored.items():
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[name].shape)
        ours = wanted[name].numpy()
        assert np.linalg.norm(found - ours) <= error * np.linalg.norm(ours) + 1e-12, name


RECIPE = """\
model:
  {vocab_size: 264, context: 48, n_layers: 2, d_model: 64, n_heads: 2, d_ff: 128, qk_norm: true,
   moe: {n_experts: 8, top_k: 2, d_expert: 32, n_shared_experts: 1, load_balancing_loss: 0.01}}
data: {files: [text.txt], tokenizer: byte, val_fraction: 0.2, cache: cache}
optim: {lr: 0.01}
trainer: {steps: 150, batch_size: 8, precision: fp32, accelerator: cpu, val_every: 50}
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_trained_model_has_the_same_perplexity_in_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{a} {b}" for a in ("fox", "hen", "owl") for b in ("sleeps", "eats", "sees")]
    rng = np.random.default_rng(0)
    lines = [f"In {rng.integers(1900, 2000)} the {rng.choice(names)}." for _ in range(1500)]
    Path("text.txt").write_text("\n".join(lines))
    Path("tiny.yaml").write_text(RECIPE)
    assert main(["train", "tiny.yaml", "--name", "run"]) == 0
    run = runs.find("run")
    ids = [256, *ByteTokenizer().encode("\n".join(lines[-60:]))]
    windows = [ids[i : i + 24] for i in range(0, 1200, 24)]
    model = checkpoints.load_model(run)[1]
    ours = model(torch.tensor(windows))[0][:, -2].log_softmax(-1)
    ours = -ours[range(len(windows)), [window[-1] for window in windows]].mean().item()
    assert ours < 3  # it has learned something: 5.6 is chance
    for quant, allowed in (("f32", 1e-5), ("f16", 1e-3), ("q8_0", 0.01), ("q4_0", 0.2)):
        export(run, Path(f"{quant}.gguf"), quant)
        llama = Llama(Path(f"{quant}.gguf"))
        rows = [(w, llama.steps(w[:-1], 1, 264)[0][1]) for w in windows]
        theirs = -sum(row[window[-1]].item() for window, row in rows) / len(rows)
        print(f"{quant}: {theirs:.4f} nats, here {ours:.4f}")
        assert theirs == pytest.approx(ours, abs=allowed)


@pytest.mark.parametrize("case", ["latent, dense", "latent, sigmoid"])
def test_depths_that_llama_cpp_takes_for_another_model_are_refused(case):
    """Queries of a latent it does not look for there."""
    config = config_of_case(case)
    for rank, depths in ((None, ()), (10, (26, 27))):
        mla = config.mla.model_copy(update={"q_lora_rank": rank})
        for n_layers in (25, 26, 27, 28):
            deep = config.model_copy(update={"mla": mla, "n_layers": n_layers})
            if n_layers not in depths:
                assert architecture_of(deep) == "deepseek2"
                continue
            with pytest.raises(UserError, match=f"model.n_layers={n_layers}: .*V2-Lite") as no:
                architecture_of(deep)
            assert "\n" not in str(no.value)


def test_vectors_and_routers_are_never_quantized():
    quants = GGMLQuantizationType
    assert storage("blk.0.attn_norm.weight", (64,), "q4_0") == quants.F32
    assert storage("blk.0.ffn_gate_inp.weight", (8, 64), "q4_0") == quants.F32
    assert storage("blk.0.ffn_up.weight", (8, 64), "q4_0") == quants.Q4_0
    assert storage("blk.0.ffn_up.weight", (8, 48), "q4_0") == quants.F16


@pytest.mark.parametrize(
    "quant, largest", [("f16", 65504), ("q8_0", 127 * 65504), ("q4_0", 8 * 65504)]
)
def test_a_number_that_a_kind_cannot_hold_is_refused(quant, largest):
    kind = getattr(GGMLQuantizationType, quant.upper())
    for value in (largest, -largest):
        rows = torch.full((1, 32), float(value))
        assert np.isfinite(gguf.dequantize(rounded("a", rows, kind), kind)).all()
        with pytest.raises(UserError, match=f"a: holds .*{quant.upper()} no more than"):
            rounded("a", rows * 1.01, kind)


def test_a_tokenizer_of_characters_is_refused_and_nothing_is_left(run_of, tmp_path):
    run, _ = run_of(config_of_case("dense"), CharTokenizer("abc"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="of characters.*data.tokenizer=bpe"):
        export(run, tmp_path / "model.gguf", "f32")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_said_of_a_file(run_of, tmp_path):
    run, _ = run_of(config_of_case("normed"))
    said = export(run, tmp_path / "model.gguf", "q8_0")
    assert said.architecture == "glm4moe" and said.step == 4
    assert "a shared expert; it is as wide as another, and zero" in said.notes[0]
    assert "6 tensors are stored in f16" in said.notes[1]  # experts of 24, and the zero one
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.name"].contents() == "run"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 256
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
