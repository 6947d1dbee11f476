"""A checkpoint from elsewhere through the verbs: import, eval, sample, tasks, page, training on."""

import json
import shutil
from pathlib import Path

import pytest
from foreign import checkpoint

from nano_moe import checkpoints, runs
from nano_moe.cli.main import main

SHORTER = ("--recipe", "tiny.yaml", "--context", "16")  # of 96 positions
SMALLER = ["trainer.steps=2", "trainer.val_every=2", "trainer.save_every=2", "trainer.log_every=2"]


@pytest.fixture
def foreign(shop):
    """A Mixtral with Llama 2's kind of tokenizer, its first positions imported; theirs is gone."""
    checkpoint("Mixtral", "llama 2", Path("theirs"))
    assert "--context 97" in shop.fault("import", "theirs", *SHORTER[:3], "97")
    said = shop.json("import", "theirs", "--name", "taken", *SHORTER)
    assert (said["run"], said["architecture"]) == ("taken", "Mixtral")
    shutil.rmtree("theirs")
    return shop


def test_all_verbs_that_read_a_run(foreign):
    scored = foreign.json("eval", "taken")
    assert scored["bpb"] > 0 and scored["tokens"] < foreign.json("eval", "done")["tokens"]
    (text,) = foreign.json("sample", "taken", "--prompt", "the old fox", "--tokens", "5")["samples"]
    assert "▁" not in str(text) and "<0x" not in str(text)
    assert foreign.json("eval", "taken", "--tasks", "2")["bits_per_byte"] > 0
    assert foreign.run("report-html", "taken", "--out", "page.html")[0] == 0
    assert "▁" not in Path("page.html").read_text().split("<script")[-1]
    assert foreign.run("export", "taken", "--to", "hf", "out")[0] == 0
    assert foreign.json("import", "out", "--name", "again")["run"] == "again"
    assert foreign.json("eval", "again")["ce"] == pytest.approx(scored["ce"], rel=1e-6)
    assert "tokenizer is a file's" in foreign.fault("export", "taken", "--to", "gguf", "x.gguf")


def test_its_recipe_trains_and_goes_on(foreign):
    recipe = "checkpoints/taken/recipe.yaml"
    assert foreign.run("train", recipe, *SMALLER, "--name", "anew")[0] == 0
    one, other = (Path("checkpoints", name, "tokenizer.json") for name in ("taken", "anew"))
    assert one.read_bytes() == other.read_bytes()
    shutil.rmtree("checkpoints/taken")  # whose tokenizer the recipe had named
    assert foreign.json("eval", "anew")["tokens"] > 0
    run = runs.find("anew")
    runs.check_recipe(run, run.recipe(), checkpoints.read_checkpoint(run.last))


def test_an_imported_dense_run_grows_experts(shop):
    checkpoint("Qwen3", "qwen", Path("theirs"))
    shop.json("import", "theirs", *SHORTER)
    shutil.rmtree("theirs")
    grown = [
        *("model.moe.n_experts=4", "model.moe.top_k=2", "model.moe.d_expert=48"),
        *("model.moe.init_from=theirs", *SMALLER),
    ]
    recipe = "checkpoints/theirs/recipe.yaml"
    status, _, err = shop.run("train", recipe, *grown, "--name", "grown")
    assert status == 0, err
    assert json.loads(Path("checkpoints/grown/manifest.json").read_text())["init_from"]["step"] == 0


def test_text_prepared_with_a_file(shop):
    checkpoint("Llama", "llama 3", Path("theirs"))
    section = ["data.tokenizer=file", "data.tokenizer_file=theirs"]
    assert "needs 333 ids" in shop.fault("prepare", "tiny.yaml", *section)
    assert shop.run("prepare", "tiny.yaml", *section, "model.vocab_size=336")[0] == 0
    missing = "data.tokenizer_file=nowhere.json"
    assert "nowhere.json: no such file" in shop.fault("prepare", "tiny.yaml", section[0], missing)
    assert "tokenizer_file" in shop.fault("prepare", "tiny.yaml", section[0])
    Path("theirs/tokenizer.json").write_text("{")
    assert "theirs/tokenizer.json: not a readable" in shop.fault("prepare", "tiny.yaml", *section)
    fault = shop.fault("import", "theirs", "--recipe", "tiny.yaml")
    assert "theirs/tokenizer.json: not a readable" in fault


def test_importing_says_what_it_needs(shop):
    checkpoint("Llama", "llama 3", Path("theirs"))
    assert main(["import", "theirs"]) == 2
    assert "--recipe" in shop.fault("import", "theirs")
