"""`export`, `import` and `eval --tasks` on a trained run: what they make, and what they refuse."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_cli_faults import on_a_full_disk

from nano_moe.cli.main import main
from nano_moe.runs import Run
from nano_moe.training.module import Decoder


def test_a_run_goes_out_and_comes_back(shop):
    said = shop.json("export", "done", "--to", "hf", "out")
    assert (said["path"], said["architecture"], said["step"]) == ("out", "MixtralForCausalLM", 6)
    assert said["difference"] < 1e-4
    assert shop.json("import", "out", "--name", "back")["run"] == "back"
    here, there = (shop.json("eval", run) for run in ("done", "back"))
    assert here["ce"] == there["ce"] and here["domains"] == there["domains"]
    texts = [shop.json("sample", run, "--seed", "3")["samples"] for run in ("done", "back")]
    assert texts[0] == texts[1]


def test_a_gguf_file_is_one_file(shop):
    before = set(shop.files())
    said = shop.json("export", "done", "--to", "gguf", "done.gguf", "--quant", "q8_0")
    assert said["architecture"] == "llama"
    assert said["n_bytes"] == Path("done.gguf").stat().st_size
    assert set(shop.files()) - before == {"done.gguf"}


def test_what_is_printed(shop):
    status, out, _ = shop.run("export", "done", "--to", "hf", "out")
    assert status == 0 and "MixtralForCausalLM, weights of step 6" in out
    assert "logits differ from ours by" in out
    status, out, _ = shop.run("import", "out")
    assert status == 0 and "make eval RUN=out" in out and "make resume RUN=out" in out


TO = (("hf", "out"), ("gguf", "out.gguf"))


@pytest.mark.parametrize("to, target", TO)
def test_runs_that_cannot_be_exported(shop, to, target):
    arguments = ("--to", to, target)
    assert "nearest: done" in shop.fault("export", "dane", *arguments)
    Path("half").mkdir()
    assert "not a run folder" in shop.fault("export", "./half", *arguments)
    Path("half/recipe.yaml").write_text(Path("checkpoints/done/recipe.yaml").read_text())
    assert "no such checkpoint" in shop.fault("export", "./half", *arguments)
    for name in ("best.ckpt", "tokenizer.json", "manifest.json"):
        for file in ("best.ckpt", "tokenizer.json", "manifest.json"):
            Path("half", file).write_bytes(Path("checkpoints/done", file).read_bytes())
        Path("half", name).write_bytes(b"{")
        if (name, to) != ("manifest.json", "gguf"):  # which says nothing of it
            assert name in shop.fault("export", "./half", *arguments)
    torch.save({"weight": torch.ones(2)}, "half/best.ckpt")
    assert "not one of nano_moe" in shop.fault("export", "./half", *arguments)


@pytest.mark.parametrize("to, target", TO)
def test_a_recipe_that_none_holds(shop, to, target):
    assert main(["train", "tiny.yaml", "--name", "ungated", "model.activation=gelu"]) == 0
    message = shop.fault("export", "ungated", "--to", to, target)
    assert "model.activation=gelu: no" in message and "model.activation=swiglu" in message


@pytest.mark.parametrize("to, target", TO)
def test_an_existing_target(shop, to, target):
    Path(target).mkdir()
    Path(target, "mine").write_text("kept")
    assert f"{target}: exists and is not overwritten" in shop.fault(
        "export", "done", "--to", to, target
    )


@pytest.mark.parametrize("to, target", TO)
def test_a_full_disk_leaves_nothing(shop, to, target):
    before = shop.files()
    arguments = ["export", "done", "--to", to, target]
    status, err = on_a_full_disk(lambda: main(arguments), after=60_000)
    assert status == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {target}: could not be written")
    assert shop.files() == before


def test_a_full_disk_leaves_no_imported_run(shop):
    shop.run("export", "done", "--to", "hf", "out")
    before = shop.files()
    status, err = on_a_full_disk(lambda: main(["import", "out", "--name", "back"]), after=60_000)
    assert status == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: checkpoints/back: could not be written")
    assert shop.files() == before


def test_arguments_that_make_no_sense(shop):
    assert "--to" in shop.fault("export", "done", "out")
    assert "--to" in shop.fault("export", "done", "--to", "onnx", "out")
    assert "--quant" in shop.fault("export", "done", "--to", "hf", "out", "--quant", "f16")
    assert "--quant" in shop.fault("export", "done", "--to", "gguf", "out", "--quant", "q2")
    assert "--out" in shop.fault("eval", "done", "--out", "tasks")
    assert "--seed: only with --tasks" in shop.fault("eval", "done", "--seed", "0")
    policy = ("--expert-policy", "lru")
    assert "only with --expert-budget" in shop.fault("sample", "done", *policy)
    assert "--tasks 0" in shop.fault("eval", "done", "--tasks", "0")


def test_imports_that_are_refused(shop):
    assert "nowhere: no such folder" in shop.fault("import", "nowhere")
    assert "config.json: missing; name a folder of Hugging Face's layout" in shop.fault(
        "import", ".", "--name", "here"
    )
    shop.run("export", "done", "--to", "hf", "out")
    assert "exists and is not overwritten" in shop.fault("import", "out", "--name", "done")
    assert "run name '../x'" in shop.fault("import", "out", "--name", "../x")
    Path("out/nano_moe.json").unlink()
    assert "--recipe" in shop.fault("import", "out")
    status, _, _ = shop.run("import", "out", "--recipe", "tiny.yaml")
    assert status == 0
    assert shop.json("eval", "out")["ce"] == shop.json("eval", "done")["ce"]


def imported(shop) -> Run:
    """The run `out`, of the exported weights of `done`."""
    shop.run("export", "done", "--to", "hf", "out")
    assert shop.run("import", "out")[0] == 0
    return Run(Path("checkpoints/out"))


def scores(run: Run) -> list[tuple[int, float]]:
    with open(run.metrics_file) as file:
        rows = [row for row in csv.DictReader(file) if row["val/ce"]]
    return [(int(row["step"]), float(row["val/ce"])) for row in rows]


def stop_at(monkeypatch, step: int) -> None:
    """SIGTERM in the step after."""
    original = Decoder.training_step

    def training_step(decoder, *arguments):
        if decoder.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(decoder, *arguments)

    monkeypatch.setattr(Decoder, "training_step", training_step)


def test_imported_weights_are_trained_on_and_stop_and_resume_like_any(shop, monkeypatch):
    whole, before = imported(shop), shop.json("eval", "out")["ce"]
    assert "metrics.csv" in shop.fault("compare", "done", "out")
    shutil.copytree(whole.path, "checkpoints/broken")
    status, out, err = shop.run("resume", "out")
    assert status == 0 and "imported weights; training begins at step 0" in err
    found = scores(whole)
    assert [step for step, _ in found] == [0, 2, 4, 6]
    assert found[0][1] == pytest.approx(before, abs=1e-6)
    assert f"{found[-1][1]:.4f} nats" in out
    assert shop.json("eval", "out")["ce"] == pytest.approx(min(ce for _, ce in found), abs=1e-6)
    assert whole.manifest()["imported"]["run"] == "done"
    assert "finished at step 6" in shop.fault("resume", "out")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert shop.run("resume", "broken")[0] == 128 + signal.SIGTERM
    status, _, err = shop.run("resume", "broken")
    assert status == 0 and "imported" not in err
    assert scores(Run(Path("checkpoints/broken"))) == found
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (
            torch.load(f"checkpoints/{run}/{name}", weights_only=True)["state_dict"]
            for run in ("out", "broken")
        )
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    for path in (whole.last, whole.previous):  # what is left was trained, and is no import any more
        path.unlink(missing_ok=True)
    assert "was trained to step" in shop.fault("resume", "out")


def test_training_that_makes_imported_weights_worse_keeps_them_as_the_best(shop):
    shop.run("export", "done", "--to", "hf", "out")
    shop.edit("tiny.yaml", "lr: 0.01", "lr: 3.0")
    shop.run("import", "out", "--recipe", "tiny.yaml")
    before = shop.json("eval", "out")
    assert shop.run("resume", "out")[0] == 0
    found = scores(Run(Path("checkpoints/out")))
    assert min(found[1:], key=lambda row: row[1])[1] > found[0][1]
    assert shop.json("eval", "out") == before
    assert torch.load("checkpoints/out/best.ckpt", weights_only=True)["global_step"] == 0


def test_imported_weights_that_cannot_be_trained_on(shop):
    run = imported(shop)
    assert "trainer.steps was changed since checkpoints/out/best.ckpt" in shop.fault(
        "resume", "out", "trainer.steps=9"
    )
    manifest = run.manifest()
    Path("text.txt").write_text("quite another text\n" * 40)
    assert "text or vocabulary differ" in shop.fault("resume", "out")
    Path("text.txt").unlink()
    assert "text.txt" in shop.fault("resume", "out")
    del manifest["corpus"]
    run.manifest_file.write_text(json.dumps(manifest))
    assert "no text to be trained on" in shop.fault("resume", "out")


def test_a_sparse_run_starts_from_an_imported_dense_one(shop):
    dense = ["model.moe=null", "--name", "dense"]
    assert main(["train", "tiny.yaml", *dense]) == 0
    shop.run("export", "dense", "--to", "hf", "out")
    shop.run("import", "out", "--name", "back")
    sparse = ["model.moe.d_expert=64", "model.moe.init_from=back", "--name", "grown"]
    assert main(["train", "tiny.yaml", *sparse]) == 0
    assert json.loads(Path("checkpoints/grown/manifest.json").read_text())["init_from"]["step"] == 6


def test_without_the_extra_a_line_says_how_to_get_it(shop, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = shop.fault("export", "done", "--to", "hf", "out")
    assert "needs transformers and gguf" in message and "'.[export]'" in message


def test_tasks_are_scored_and_written(shop):
    said = shop.json("eval", "done", "--tasks", "5", "--seed", "1", "--out", "tasks")
    assert said["bits_per_byte"] > 0
    assert {path.name for path in Path("tasks").iterdir()} >= {"nano_moe_bpb.jsonl"}
    assert shop.json("eval", "done", "--tasks", "5", "--seed", "1") == said
    status, out, _ = shop.run("eval", "done", "--tasks", "5")
    assert status == 0 and "bits per byte" in out
    exists = shop.fault("eval", "done", "--tasks", "5", "--out", "tasks")
    assert "error: tasks: exists and is not overwritten; name another" in exists
    nowhere = shop.fault("eval", "done", "--tasks", "5", "--out", "nodir/x")
    assert "error: nodir/x: could not be written (No such file or directory)" in nowhere
