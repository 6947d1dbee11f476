"""Exported folders: what `AutoModelForCausalLM` makes of them, and how they appear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from export_cases import ONE_OF_EACH, config_of_case
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from nano_moe import recipe_file
from nano_moe.errors import UserError
from nano_moe.export import gguf_file, hugging_face
from nano_moe.export.card import text_of
from nano_moe.export.hugging_face import export, loading_options
from nano_moe.inference.generate import generate
from nano_moe.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

TEXT = "the cat and the hat sat there; "
# What a user's process does, with the hub's switch and without a network.
OFFLINE = """
import json, socket, sys

def refuse(*_, **__):
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("the", return_tensors="pt")
made = model.generate(**ids, do_sample=False, max_new_tokens=20)[0]
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0, -1]
text = tokenizer.decode(made, skip_special_tokens=True)
print(json.dumps({"text": text, "class": type(model).__name__, "logits": logits.tolist()}))
"""


def greedy(model, tokenizer, prompt: str, n: int) -> str:
    return prompt + "".join(generate(model, tokenizer, prompt, max_tokens=n, temperature=0))


@pytest.mark.parametrize("case", ONE_OF_EACH)
@torch.no_grad()
def test_loading_it_gives_the_same_logits_and_greedy_text(run_of, tmp_path, case):
    config = config_of_case(case)
    tokenizer = BPETokenizer.train([TEXT * 40], 300) if case == "normed" else ByteTokenizer()
    if case == "normed":
        config = config.model_copy(update={"vocab_size": tokenizer.n_vocab + 5})
    run, model = run_of(config, tokenizer)
    said = export(run, tmp_path / "out")
    options = loading_options(config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == said.architecture
    tokens = torch.randint(0, tokenizer.n_vocab, (2, 40))
    assert (model(tokens)[0] - theirs(tokens).logits).abs().max() < 2e-5
    assert said.difference < 2e-5
    ids = fast("the", return_tensors="pt")
    made = theirs.generate(**ids, do_sample=False, max_new_tokens=16)[0, 1:]
    ours = greedy(model, tokenizer, "the", 16)
    assert fast.decode(made, skip_special_tokens=True) == ours


def test_it_loads_without_a_network(run_of, tmp_path):
    run, model = run_of(config_of_case("normed, shared"))
    export(run, tmp_path / "out")
    ids = [256, 5, 100, 7]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, str(tmp_path / "out"), json.dumps(ids)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0][0, -1]
    assert (ours - torch.tensor(found["logits"])).abs().max() < 2e-5
    assert found["text"] == greedy(model, ByteTokenizer(), "the", 20)
    assert found["class"] == "Qwen3NextForCausalLM"


def test_a_folder_holds_what_a_reader_needs_and_no_pickle(run_of, tmp_path):
    run, _ = run_of(config_of_case("sparse, scaled"))
    export(run, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "nano_moe.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not any("lm_head" in name for name in file.keys())  # tied
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert made["bos_token_id"] == made["eos_token_id"] == made["pad_token_id"] == 256
    assert made["suppress_tokens"] == list(range(257, 264))


def test_the_card_says_what_it_is(run_of, tmp_path):
    run, _ = run_of(config_of_case("sparse, scaled"), name="first")
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# first",
        "MixtralForCausalLM",
        "2.5000 nats per token",
        "| validation bits per byte | 1.2500 |",
        "4 of 4 steps",
        "0123abc",
        "learned factor is multiplied",
        "routed_scaling_factor: 1.7",
    ):
        assert part in card
    run.metrics_file.unlink()
    export(run, tmp_path / "again")
    assert "not measured" in (tmp_path / "again" / "README.md").read_text()


def test_widths_that_grouped_products_cannot_do_are_said(run_of, tmp_path):
    config = config_of_case("sparse")
    assert loading_options(config) == {}
    odd = config.model_copy(update={"moe": config.moe.model_copy(update={"d_expert": 18})})
    run, _ = run_of(odd)
    export(run, tmp_path / "out")
    assert "experts_implementation='eager'" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_computes_otherwise_never_appears(run_of, tmp_path, monkeypatch):
    right = hugging_face.weights_of

    def wrong(*arguments):
        made = right(*arguments)
        return {n: t.flip(1) if n.endswith("gate_up_proj") else t for n, t in made.items()}

    run, _ = run_of(config_of_case("sparse"))
    monkeypatch.setattr(hugging_face, "weights_of", wrong)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="logits differ"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("to", [export, partial(gguf_file.export, quant="f32")], ids=["hf", "gguf"])
def test_weights_that_are_not_finite_are_refused_by_name(run_of, tmp_path, to, number):
    run, _ = run_of(config_of_case("sparse"))
    checkpoint = torch.load(run.best, weights_only=True)
    checkpoint["state_dict"]["model.blocks.1.ffn.experts.down"][3, 2, 1] = number
    torch.save(checkpoint, run.best)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"run: blocks\.1\.ffn\.experts\.down: 1 of 4,608 numbers"):
        to(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_logits_that_are_no_numbers_are_a_difference(run_of, tmp_path, monkeypatch):
    right = hugging_face.weights_of

    def spoilt(*arguments):
        return {name: tensor * torch.nan for name, tensor in right(*arguments).items()}

    run, _ = run_of(config_of_case("dense"))
    monkeypatch.setattr(hugging_face, "weights_of", spoilt)
    with pytest.raises(RuntimeError, match="logits differ"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_what_exists_is_not_touched(run_of, tmp_path, make):
    run, _ = run_of(config_of_case("dense"))
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="out: exists and is not overwritten"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_there_is_not_made(run_of, tmp_path):
    run, _ = run_of(config_of_case("dense"))
    with pytest.raises(UserError, match="could not be written"):
        export(run, tmp_path / "some" / "out")
    assert not (tmp_path / "some").exists()


def test_a_killed_export_leaves_no_folder_and_the_next_one_clears_up(run_of, tmp_path, monkeypatch):
    run, _ = run_of(config_of_case("dense"))
    before = {path.name for path in tmp_path.iterdir()}
    child = os.fork()
    if child == 0:
        hugging_face.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            export(run, tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = {path.name for path in tmp_path.iterdir()} - before
    assert left == f".out.{child}.tmp"
    export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} - before == {"out"}


def test_a_tokenizer_larger_than_the_vocabulary(run_of, tmp_path):
    config = config_of_case("dense").model_copy(update={"vocab_size": 3})
    run, _ = run_of(config, CharTokenizer("abc"))
    with pytest.raises(UserError, match="tokenizer.json: 5 ids, and the run's model has 3;"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_card_names_the_terms_of_its_text():
    said = text_of(recipe_file.load(RECIPES / "mixtral.yaml", ()))
    assert "CC BY-SA 4.0" in said and "BSD-3-Clause" in said
    fewer = recipe_file.load(RECIPES / "mixtral.yaml", ("data.domains=[law]",))
    assert text_of(fewer) == "law (sources: data/README.md of nano_moe)"
