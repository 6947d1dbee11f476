"""Experts in 8 and 4 bits: the formats by brute force, and the same numbers as in the file."""

import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from export_cases import config_of_case, drawn

from nano_moe.errors import UserError
from nano_moe.export.gguf_file import (
    EXPERTS,
    WHOLE_HEAD,
    architecture_of,
    export,
    tensors_of,
)
from nano_moe.export.quantized import WIDTHS, stored_bytes, with_quantized_experts
from nano_moe.model.gpt import GPT


def whole_blocks(case):
    """The case with experts of 32."""
    config = config_of_case(case)
    moe = config.moe.model_copy(update={"d_expert": 32})
    return config.model_copy(update={"moe": moe})


def test_they_need_the_package_gguf_alone():
    blocked = "import sys; sys.modules['transformers'] = sys.modules['tokenizers'] = None"
    code = f"{blocked}; import nano_moe.export.quantized, nano_moe.export.gguf_file"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def half(number: float) -> float:
    """The nearest number of 16 bits."""
    return struct.unpack("e", struct.pack("e", number))[0]


def by_hand(block: list[float], quant: str) -> list[tuple[float, bool]]:
    """Per number of a block what is stored of it, in float64, and whether a tie made it so.

    q8_0: steps of the largest magnitude / 127; q4_0: of the largest number / -8, 16 of them.
    """
    largest = max(block, key=abs)
    step = abs(largest) / 127 if quant == "q8_0" else largest / -8
    found = []
    for number in block:
        steps = number / step if step else 0.0
        level = int(abs(steps) + 0.5) * (1 if steps > 0 else -1)
        if quant == "q4_0":
            level = min(15, int(steps + 8.5)) - 8
        tie = abs(abs(steps) % 1 - 0.5) < 1e-4
        found.append((level * half(step), tie))
    return found


@pytest.mark.parametrize("quant", WIDTHS)
def test_weights_are_rounded_block_by_block(quant):
    model = drawn(GPT(whole_blocks("shared")))
    first = model.blocks[0].ffn.experts.gate_up
    with torch.no_grad():
        first[0, 0] = 0.0  # a block of nothing
        first[0, 1] = torch.linspace(-1, 1, 32)  # as large on both sides
        first[0, 2] *= 1e-3
    rounded = with_quantized_experts(model, quant)
    for name in ("experts.gate_up", "experts.down", "shared.down.weight"):
        ours = model.blocks[0].ffn.get_parameter(name).detach().double().reshape(-1, 32)
        stored = rounded.blocks[0].ffn.get_parameter(name).detach().double().reshape(-1, 32)
        for before, after in zip(ours.tolist(), stored.tolist(), strict=True):
            for found, (wanted, tie) in zip(after, by_hand(before, quant), strict=True):
                assert found == wanted or tie, name


@pytest.mark.parametrize(("quant", "steps", "levels"), [("q8_0", 0.5, 127), ("q4_0", 1.0, 8)])
def test_no_number_is_further_off_than_the_format_allows(quant, steps, levels):
    """Half a step; in q4_0 a whole one where a number is as large as the largest, of other sign."""
    model = drawn(GPT(whole_blocks("sparse")))
    rounded = with_quantized_experts(model, quant)
    for before, after in zip(model.blocks, rounded.blocks, strict=True):
        ours, found = (b.ffn.experts.down.detach().reshape(-1, 32) for b in (before, after))
        step = ours.abs().amax(1, keepdim=True) / levels
        of_scale = ours.abs().amax(1, keepdim=True) * 2**-11  # its 11 bits
        assert ((ours - found).abs() <= steps * step + of_scale + 1e-7).all()
        assert (ours - found).abs().max() > step.min() / 4  # and it did round


@pytest.mark.parametrize("case", ["sparse", "normed, shared", "gated, not normalized"])
def test_all_but_the_experts_is_left_alone(case):
    model = drawn(GPT(whole_blocks(case)))
    after = with_quantized_experts(model, "q4_0").state_dict()
    assert after.keys() == model.state_dict().keys()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, after[name])}
    experts = {n for n in after if ".ffn.experts." in n or ".ffn.shared." in n}
    assert changed == experts and not any("router" in name for name in changed)


@pytest.mark.parametrize("quant", WIDTHS)
@pytest.mark.parametrize(
    "case", ["sparse, scaled", "normed, shared", "sigmoid, normed, scaled", "gated, not normalized"]
)
def test_the_file_holds_the_very_numbers_that_are_evaluated(run_of, tmp_path, case, quant):
    run, model = run_of(whole_blocks(case))
    rounded = with_quantized_experts(model, quant)
    export(run, tmp_path / "model.gguf", f"experts-{quant}")
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    arch = architecture_of(model.config)
    wanted = dict(tensors_of(arch, rounded.config, rounded.state_dict()))
    assert {tensor.name for tensor in tensors} == wanted.keys()
    experts = everything = 0
    for tensor in tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[tensor.name].shape)
        assert np.array_equal(found, wanted[tensor.name].numpy()), tensor.name
        of_experts = "gate_inp" not in tensor.name and any(p in tensor.name for p in EXPERTS)
        assert tensor.tensor_type.name.lower() == (quant if of_experts else "f32")
        if wanted[tensor.name].any():  # zeros are what the architecture wants and we have not
            experts += int(tensor.n_bytes) if of_experts else 0
            everything += int(tensor.n_bytes)
    folded = sum(t.nbytes for n, t in model.state_dict().items() if n.endswith("router.scale"))
    twice = wanted["output.weight"].nbytes if arch in WHOLE_HEAD else 0  # a tied head
    assert stored_bytes(model, quant) == (experts, everything + folded - twice)


@torch.no_grad()
def test_it_computes_almost_the_same(tokens):
    model = drawn(GPT(whole_blocks("normed, shared")))
    logits = model(tokens)[0].log_softmax(-1)
    off = {q: (with_quantized_experts(model, q)(tokens)[0].log_softmax(-1) - logits).abs().mean()
           for q in WIDTHS}  # fmt: skip
    assert 0 < off["q8_0"] < 0.2 * off["q4_0"]


def test_what_cannot_be_quantized_is_refused(run_of, tmp_path):
    dense, narrow = config_of_case("dense"), config_of_case("sparse")  # experts of 24
    for config, fault in ((dense, "no experts to quantize"), (narrow, "moe.d_expert=24.*of 32")):
        with pytest.raises(UserError, match=fault):
            with_quantized_experts(drawn(GPT(config)), "q8_0")
        run, _ = run_of(config, name=fault[:5])
        with pytest.raises(UserError, match=fault):
            export(run, tmp_path / "model.gguf", "experts-q4_0")
    assert not (tmp_path / "model.gguf").exists()
