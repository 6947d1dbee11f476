"""`eval --quant-experts` on a trained run: the table by domain, the bytes, and what is refused."""

import json
from pathlib import Path

import pytest

from nano_moe.cli.main import main


def test_domains_add_up_and_fp32_is_what_eval_says(shop):
    for place, word in (("sea", "wave"), ("land", "stone")):
        Path(place).mkdir()
        for i in range(6):
            text = " ".join(f"{word} {i * j % 17}" for j in range(40))
            Path(place, f"{i}.txt").write_text(f"{text}\n")
    files = f"data.files={json.dumps(['sea', 'land'])}"
    assert main(["train", "tiny.yaml", "--name", "two", files]) == 0
    found = shop.json("eval", "two", "--quant-experts")
    assert list(found) == ["fp32", "q8_0", "q4_0"]
    plain = shop.json("eval", "two")
    assert {key: found["fp32"][key] for key in plain} == plain
    for one in found.values():
        domains = one["domains"].values()
        assert len(domains) == 2
        nats = sum(domain["ce"] * domain["tokens"] for domain in domains)
        assert nats / one["tokens"] == pytest.approx(one["ce"], rel=1e-12)
    assert found["fp32"]["ce"] != found["q8_0"]["ce"] != found["q4_0"]["ce"]
    assert abs(found["q8_0"]["ce"] - plain["ce"]) < 1e-3
    experts = 2 * 4 * 3 * 32 * 32  # layers, experts, matrices, D, F
    sizes = {quant: one["stored_bytes"] for quant, one in found.items()}
    bits = {"fp32": 32, "q8_0": 8.5, "q4_0": 4.5}  # with a scale of 16 bits per 32
    assert {q: of["experts"] for q, of in sizes.items()} == {
        q: experts * width / 8 for q, width in bits.items()
    }
    assert len({of["all"] - of["experts"] for of in sizes.values()}) == 1


def test_what_is_printed(shop):
    status, out, err = shop.run("eval", "done", "--quant-experts")
    assert status == 0 and "int8 (q8_0)" in out and "int4 (q4_0)" in out and "change" in out
    assert "all weights" in out and "experts in q4_0" in err


def test_a_file_of_quantized_experts_is_written(shop):
    sizes = {}
    for quant in ("f32", "experts-q8_0", "experts-q4_0"):
        said = shop.json("export", "done", "--to", "gguf", f"{quant}.gguf", "--quant", quant)
        sizes[quant] = said["n_bytes"]
    stored = shop.json("eval", "done", "--quant-experts")
    for quant in ("q8_0", "q4_0"):
        less = stored["fp32"]["stored_bytes"]["all"] - stored[quant]["stored_bytes"]["all"]
        assert sizes["f32"] - sizes[f"experts-{quant}"] == less


def test_what_is_refused(shop, monkeypatch):
    assert "drop --tasks" in shop.fault("eval", "done", "--quant-experts", "--tasks", "5")
    for name, field in (("dense", "model.moe=null"), ("narrow", "model.moe.d_expert=24")):
        assert main(["train", "tiny.yaml", "--name", name, field]) == 0
        said = shop.fault("eval", name, "--quant-experts")
        assert field in said
        arguments = ("--to", "gguf", "out.gguf", "--quant", "experts-q8_0")
        assert field in shop.fault("export", name, *arguments)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = shop.fault("eval", "done", "--quant-experts")
    assert "needs gguf" in message and "'.[export]'" in message
