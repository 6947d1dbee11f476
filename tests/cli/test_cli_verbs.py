"""What the verbs do when all is well: figures as JSON, names, overrides, help without torch."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nano_moe import recipe_file
from nano_moe.cli.main import VERBS

COUNT_KEYS = {
    "total_params",
    "active_params",
    "embedding_params",
    "router_params",
    "forward_flops_per_token",
    "train_flops_per_token",
    "weight_bytes",
    "kv_cache_bytes_per_token",
    "activation_bytes_per_token",
    "step",
}
EVAL_KEYS = {"ce", "bpb", "perplexity", "tokens", "bytes", "domains", "routing"}


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [*VERBS, ""])
def test_help_imports_none_of_the_large_libraries(verb):
    command = [sys.executable, "-X", "importtime", "-m", "nano_moe", *verb.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: nano-moe {verb}")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "nano_moe.cli.main" in imported
    assert not imported & {"torch", "lightning", "datasets", "tensorboard", "tiktoken", "numpy"}


def test_no_verb_at_all_lists_the_verbs_and_is_a_fault(shop):
    status, out, _ = shop.run()
    assert status == 2 and all(f"  {verb}" in out for verb in VERBS)


# --- recipes -------------------------------------------------------------------------------------


def test_count_prints_one_object_with_the_promised_keys(shop):
    counted = shop.json("count", "tiny.yaml")
    assert counted.keys() >= COUNT_KEYS
    assert counted["router_params"] == 2 * 4 * 32  # 2 layers, 4 experts, width 32
    assert counted["embedding_params"] == 264 * 32  # tied: the head is the embedding
    assert counted["weight_bytes"] == 4 * counted["total_params"]
    dense = shop.json("count", "tiny.yaml", "model.moe=null")
    assert dense["active_params"] == dense["total_params"]
    assert counted["active_params"] == dense["active_params"] + counted["router_params"]


def test_count_says_what_training_keeps_of_a_token_and_what_a_step_holds(shop):
    found = shop.json("count", "tiny.yaml")
    for by_kept in found["activation_bytes_per_token"].values():
        for by_part in by_kept.values():
            assert by_part.pop("total") == sum(by_part.values())
    step = found["step"]
    again = shop.json("count", "tiny.yaml", "trainer.activation_checkpointing=true")["step"]
    assert (step["precision"], step["moment"]) == ("fp32", "optimizer")
    assert step["bytes"] >= sum(found[f"{k}_bytes"] for k in ("weight", "gradient", "optimizer"))
    assert again["bytes"] <= step["bytes"]
    large = ("trainer.batch_size=999", "trainer.precision=bf16")
    step = shop.json("count", "tiny.yaml", *large)["step"]
    assert step["moment"] == "loss" and step["compiled_bytes_at_most"] > 0
    _, out, _ = shop.run("count", "tiny.yaml", *large)
    assert "with activation_checkpointing" in out and "at its fullest, at the loss" in out
    assert "Compiled products of experts may take up to" in out
    assert max(len(line) for line in out.splitlines() if line.startswith("│")) <= 80


def test_show_prints_a_recipe_that_loads_as_the_same(shop):
    status, out, _ = shop.run("show", "tiny.yaml", "optim.lr=0.5", "model.n_layers=3")
    Path("shown.yaml").write_text(out)
    assert status == 0
    expected = recipe_file.load("tiny.yaml", ["optim.lr=0.5", "model.n_layers=3"])
    assert recipe_file.load("shown.yaml") == expected


def test_prepare_prints_what_it_found_and_where(shop):
    found = shop.json("prepare", "tiny.yaml")
    manifest = json.loads(Path("checkpoints/done/manifest.json").read_text())
    assert found["sha256"] == manifest["corpus"]["sha256"]
    assert Path(found["path"]).is_dir()
    text = found["domains"]["text"]
    assert text["train"]["bytes"] + text["val"]["bytes"] == Path("text.txt").stat().st_size


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny.yaml", "--name", "x", "optim.lr=0.5", "trainer.steps=2"],
        ["tiny.yaml", "optim.lr=0.5", "--name", "x", "trainer.steps=2"],
        ["tiny.yaml", "optim.lr=0.5", "trainer.steps=2", "--name", "x"],
        ["--name", "x", "tiny.yaml", "optim.lr=0.5", "trainer.steps=2"],
        ["--name=x", "tiny.yaml", "trainer.steps=2", "optim.lr=0.5"],
    ],
)
def test_options_may_stand_among_the_overrides(shop, monkeypatch, arguments):
    parsed = []
    monkeypatch.setattr("nano_moe.cli.train.run", parsed.append)
    assert shop.run("train", *arguments)[0] == 0
    assert (parsed[0].recipe, parsed[0].name) == ("tiny.yaml", "x")
    assert sorted(parsed[0].overrides) == ["optim.lr=0.5", "trainer.steps=2"]


def test_train_prints_one_object_and_leaves_a_run_that_explains_itself(shop):
    found = shop.json("train", "tiny.yaml", "trainer.steps=3", "--name", "x", "seed=9")
    assert found.keys() >= EVAL_KEYS | {"run", "step", "seconds"}
    assert (found["run"], found["step"]) == ("x", 3)
    run = Path("checkpoints/x")
    names = {path.name for path in run.iterdir()}
    kept = {"recipe.yaml", "manifest.json", "metrics.csv", "last.ckpt", "best.ckpt"}
    assert names >= kept | {"tokenizer.json"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    recipe = recipe_file.load(run / "recipe.yaml")
    assert recipe == recipe_file.load("tiny.yaml", ["trainer.steps=3", "seed=9"])
    manifest = json.loads((run / "manifest.json").read_text())
    counted = shop.json("count", "tiny.yaml")
    assert manifest["seed"] == 9 and manifest["device"] == "cpu"
    assert manifest["parameters"]["total"] == counted["total_params"]
    assert manifest["parameters"]["active"] == counted["active_params"]
    assert manifest["train_flops_per_token"] == counted["train_flops_per_token"]
    assert manifest["versions"].keys() >= {"python", "torch", "lightning"}
    assert "git_commit" in manifest


def test_train_says_costs_first_and_results_last(shop):
    status, out, err = shop.run("train", "tiny.yaml", "trainer.steps=2")
    assert status == 0
    order = ["total parameters", "active parameters", "training FLOPs", "validation loss"]
    order += ["bits per byte", "sample: The", "make tensorboard"]
    places = [out.find(part) for part in order]
    assert -1 not in places and places == sorted(places)
    assert "checkpoints/tiny-1" in out and "tiny-1" in err


def test_a_runs_own_recipe_runs_again_to_the_same_weights(shop):
    first = shop.json("eval", "done")
    again = shop.json("train", "checkpoints/done/recipe.yaml")
    assert again["run"] == "done-1"  # called after the run it came from, which stays as it is
    assert shop.json("eval", "done-1") == first
    metrics = [_rows(f"checkpoints/{name}") for name in ("done", "done-1")]
    assert metrics[0] == metrics[1]


def _rows(run: str) -> list[dict[str, str]]:
    with open(f"{run}/metrics.csv", newline="") as file:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(file)]


def test_resume_goes_on_with_a_copy_of_a_run_under_another_name(shop, monkeypatch):
    """A run is its folder: nothing in it says where it lies."""
    from nano_moe.training.module import Decoder

    step, original = [], Decoder.training_step

    def crash_at_5(module, batch, batch_idx):
        step.append(batch_idx)
        return original(module, batch, batch_idx) if len(step) != 5 else 1 / 0

    monkeypatch.setattr(Decoder, "training_step", crash_at_5)
    monkeypatch.setenv("NANO_MOE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        shop.run("train", "tiny.yaml", "--name", "x")
    Path("checkpoints/x").rename("elsewhere")
    assert shop.json("resume", "elsewhere")["step"] == 6
    assert _rows("elsewhere") == _rows("checkpoints/done")


# --- judging -------------------------------------------------------------------------------------


def test_eval_gives_the_promised_figures_and_the_same_ones_twice(shop):
    found = shop.json("eval", "done")
    assert found.keys() == EVAL_KEYS
    assert found == shop.json("eval", "checkpoints/done")
    assert found["perplexity"] == pytest.approx(math.exp(found["ce"]))
    nats = found["ce"] * found["tokens"]
    assert found["bpb"] == pytest.approx(nats / math.log(2) / found["bytes"])
    assert found["domains"].keys() == {"text"}
    assert [row["layer"] for row in found["routing"]] == [0, 1]
    for row in found["routing"]:
        assert sum(row["load"]) == pytest.approx(1) and len(row["load"]) == 4
        assert row["max_share"] == pytest.approx(max(row["load"]))


def test_eval_of_the_best_checkpoint_is_the_best_validation_of_the_metrics(shop):
    rows = [row for row in _rows("checkpoints/done") if row["val/ce"]]
    best = min(rows, key=lambda row: float(row["val/ce"]))
    found = shop.json("eval", "done")
    assert (found["ce"], found["bpb"]) == (float(best["val/ce"]), float(best["val/bpb"]))


def test_eval_in_words_has_the_same_figures(shop):
    status, out, _ = shop.run("eval", "done")
    found = shop.json("eval", "done")
    assert status == 0
    assert f"{found['ce']:.4f}" in out and f"{found['bpb']:.4f}" in out
    assert "README.md, Reading a run" in out and "vio" in out


def test_sample_is_one_text_for_one_seed(shop):
    words = ("sample", "done", "--prompt", "the fox", "--tokens", "40", "--seed")
    first, same, other = (shop.json(*words, seed) for seed in ("1", "1", "2"))
    assert first.keys() == {"samples", "step", "seconds", "experts"}
    assert first["samples"] == same["samples"] != other["samples"]
    status, out, _ = shop.run(*words, "1")
    (sample,) = first["samples"]
    assert status == 0 and out == f"the fox{sample['text']}\n"


def test_several_prompts_are_drawn_together(shop):
    both = shop.json("sample", "done", "--prompt", "a", "--prompt", "the fox", "--tokens", "9")
    alone = shop.json("sample", "done", "--prompt", "a", "--tokens", "9")
    assert [sample["prompt"] for sample in both["samples"]] == ["a", "the fox"]
    assert both["samples"][0] == alone["samples"][0]
    _, out, _ = shop.run("sample", "done", "--prompt", "a", "--prompt", "the fox", "--tokens", "9")
    assert out == "".join(f"{s['prompt']}{s['text']}\n\n" for s in both["samples"])


def test_experts_left_on_disk_say_the_same(shop):
    words = ("sample", "done", "--prompt", "the fox", "--tokens", "30")
    whole, left = shop.json(*words), shop.json(*words, "--expert-budget", "50%")
    assert left["samples"] == whole["samples"] and left["step"] == whole["step"]
    assert whole["experts"] is None and 0 < left["experts"]["hit_rate"] <= 1
    _, out, err = shop.run(*words, "--expert-budget", "100%", "--expert-policy", "lfu")
    assert out == f"the fox{whole['samples'][0]['text']}\n"
    assert err.rstrip().endswith("calls found their expert there")
    ahead = shop.run(*words, "--expert-budget", "50%", "--expert-prefetch")
    assert ahead[1] == out and ahead[2].rstrip().endswith("there or on its way")
    assert "--expert-prefetch: only with" in shop.fault(*words, "--expert-prefetch")
    fault = shop.fault("sample", "done", "--expert-budget", "1%")
    assert "holds 0 of" in fault and "or more" in fault
    assert "25% or 64MB" in shop.fault("sample", "done", "--expert-budget", "half")


def test_compare_prints_every_run_at_every_budget(shop):
    shop.run("train", "tiny.yaml", "--name", "dense", "model.moe=null", "trainer.steps=4")
    found = shop.json("compare", "done", "dense")
    assert found["budgets"]["tokens"] == 4 * 4 * 16  # the shorter run's
    assert [row["run"] for row in found["runs"]] == ["done", "dense"]
    for row in found["runs"]:
        rows = [r for r in _rows(f"checkpoints/{row['run']}") if r["val/ce"]]
        (at_4,) = [float(r["val/ce"]) for r in rows if r["step"] == "4"]
        assert row["at_equal_tokens"]["ce"] == at_4
        assert row["final"]["ce"] == float(rows[-1]["val/ce"])
    status, out, _ = shop.run("compare", "done", "dense")
    assert status == 0 and "different text" not in out


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_tables_lose_no_figure_in_a_narrow_terminal(shop, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    compared = shop.json("compare", "done")["runs"][0]
    _, out, _ = shop.run("compare", "done")
    for budget in ("tokens", "flops", "seconds"):
        assert f"{compared[f'at_equal_{budget}']['ce']:.4f}" in out
    routing = shop.json("eval", "done")["routing"]
    _, evaluated, _ = shop.run("eval", "done")
    for row in routing:
        for name in row.keys() - {"layer", "load", "domain_load"}:
            assert f"{row[name]:.3f}" in evaluated, name
    assert "…" not in out + evaluated


def test_compare_warns_of_runs_on_different_text(shop):
    Path("other.txt").write_text(Path("text.txt").read_text()[::-1])
    shop.run("train", "tiny.yaml", "--name", "other", "data.files=other.txt", "trainer.steps=2")
    status, out, _ = shop.run("compare", "done", "other")
    assert status == 0 and "different text" in out
    rows = shop.json("compare", "done", "other")["runs"]
    assert rows[0]["corpus"] != rows[1]["corpus"]


def test_expert_choice_trains_as_a_demo_and_is_refused_where_it_would_mislead(shop):
    choice = ["model.moe.routing=expert_choice", "model.moe.load_balancing_loss=0"]
    status, out, _ = shop.run("train", "tiny.yaml", *choice, "--name", "leak")
    assert status == 0
    assert "not evaluated" in out and "tokens after it" in out and "validation loss" not in out
    assert shop.json("train", "tiny.yaml", *choice)["ce"] is None
    for verb in (["eval", "leak"], ["sample", "leak"], ["compare", "done", "leak"]):
        assert "expert_choice sees the future" in shop.fault(*verb)
    assert "checkpoints/leak: " in shop.fault("compare", "done", "leak")
    assert shop.run("sample", "leak")[1] == ""  # not even the prompt


def test_a_sparse_run_starts_from_a_dense_one(shop):
    dense = shop.json("train", "tiny.yaml", "model.moe=null", "trainer.steps=30", "--name", "dense")
    moe = ["model.moe.init_from=dense", "model.moe.d_expert=64", "trainer.steps=1"]
    on = shop.json("train", "tiny.yaml", *moe, "optim.lr=1e-9", "--name", "on")
    assert on["ce"] == pytest.approx(dense["ce"], abs=1e-3)
    _, out, _ = shop.run("compare", "dense", "on")
    assert "on starts from the weights of dense, whose" in out and "are not counted" in out


def test_what_is_not_shared_out_is_said(shop):
    fsdp = "trainer.strategy=fsdp"
    assert "of one process that holds it all" in shop.run("count", "tiny.yaml", fsdp)[1]
    assert "of one process that holds it all" not in shop.run("count", "tiny.yaml")[1]
    err = shop.run("train", "tiny.yaml", fsdp, "trainer.steps=1", "optim.warmup_steps=0")[2]
    assert "trainer.strategy: fsdp on one process keeps all of the model there" in err
