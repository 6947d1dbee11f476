"""Bad input: status 2, one line that names the fault and the remedy, and nothing overwritten."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from nano_moe.cli.main import main

RECIPE_VERBS = ("train", "count", "show", "prepare")
RUN_VERBS = ("resume", "eval", "sample", "compare")


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", RECIPE_VERBS)
@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("n_experts:", "n_expert:", ["tiny.yaml:10: model.moe.n_expert:", "'n_experts'"]),
        ("d_ff: 64", "d_ff: wide", ["tiny.yaml:8: model.d_ff:", "a whole number", "wide"]),
        ("context: 16", "context: 16\n  context: 8", ["tiny.yaml:5:", "context", "twice"]),
        ("top_k: 2", "top_k: 9", ["tiny.yaml:11: model.moe.top_k:", "9", "n_experts=4"]),
        ("n_heads: 2", "n_heads: 3", ["tiny.yaml:7: model.n_heads:", "d_model=32"]),
        ("seed: 5", "base: tiny.yaml", ["tiny.yaml: base:", "circle"]),
        ("seed: 5", "base: none.yaml", ["tiny.yaml:1: base:", "none.yaml"]),
        ("seed: 5", "seed: [5", ["tiny.yaml:", "not YAML"]),
    ],
)
def test_a_faulty_recipe(shop, verb, old, new, parts):
    shop.edit("tiny.yaml", old, new)
    message = shop.fault(verb, "tiny.yaml")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("verb", RECIPE_VERBS)
def test_a_missing_recipe(shop, verb):
    assert "tony.yaml: no such recipe; did you mean tiny.yaml?" in shop.fault(verb, "tony.yaml")
    assert "checkpoints" in shop.fault(verb, "checkpoints")


@pytest.mark.parametrize("verb", RECIPE_VERBS)
def test_a_faulty_override(shop, verb):
    assert "no such field" in shop.fault(verb, "tiny.yaml", "model.depth=3")
    assert "key=value" in shop.fault(verb, "tiny.yaml", "model.depth")
    assert "model.d_ff" in shop.fault(verb, "tiny.yaml", "model.d_ff=1e3")


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "prepare"])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["text.txt", "no text"]),
        (b"short", ["split holds", "model.context=16", "at least 17"]),
        (b"x" * 40, ["validation split holds 9 tokens", "data.val_fraction"]),
        (b"caf\xe9 " * 200, ["text.txt: not UTF-8 at byte 3 (0xe9)"]),
        (b"ab\x00c" * 200, ["text.txt: binary, with a zero at byte 2"]),
    ],
)
def test_unusable_text(shop, verb, content, parts):
    Path("text.txt").write_bytes(content)
    message = shop.fault(verb, "tiny.yaml")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_missing_text(shop, verb):
    message = shop.fault(verb, "tiny.yaml", "data.files=[text.txt, nowhere.txt]")
    assert "nowhere.txt does not exist" in message
    Path("empty").mkdir()
    assert "holds no text files" in shop.fault(verb, "tiny.yaml", "data.files=empty")


@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_a_tokenizer_that_does_not_fit_gives_the_number(shop, verb):
    message = shop.fault(verb, "tiny.yaml", "model.vocab_size=200")
    assert "257" in message and "model.vocab_size=264" in message
    message = shop.fault(verb, "tiny.yaml", "data.tokenizer=gpt2", "data.gpt2_ranks=no.tiktoken")
    assert "no.tiktoken" in message


def test_a_device_that_is_not_there(shop, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = shop.fault("train", "tiny.yaml", "trainer.accelerator=gpu")
    assert "trainer.accelerator" in message


def test_a_dense_run_to_start_from_that_is_not_there_or_does_not_fit(shop):
    recipe = ["tiny.yaml", "model.moe.d_expert=64"]
    message = shop.fault("train", *recipe, "model.moe.init_from=dane")
    assert "model.moe.init_from: run 'dane': no such run; nearest: done" in message
    message = shop.fault("train", *recipe, "model.moe.init_from=done")
    assert "model.moe.init_from: checkpoints/done is sparse itself; name a dense run" in message


def test_memory_that_torch_cannot_have_is_said_as_such(shop, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 17 GB")

    monkeypatch.setattr("nano_moe.training.fit.Decoder", refuse)
    assert "out of memory; lower trainer.batch_size" in shop.fault("train", "tiny.yaml")


def test_brackets_in_names_are_no_markup(shop):
    for folder in ("a[red]", "b[/bold]"):
        Path(folder).mkdir(parents=True)
        Path(folder, "tiny.yaml").write_text(Path("tiny.yaml").read_text())
        status, out, _ = shop.run("count", f"{folder}/tiny.yaml")
        assert status == 0 and f"{folder}/tiny.yaml" in out


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_a_run_that_does_not_exist(shop, verb):
    assert "run 'dane': no such run; nearest: done" in shop.fault(verb, "dane")
    assert "not a run folder" in shop.fault(verb, "checkpoints/..")


def test_an_existing_name_is_refused_before_anything_is_done(shop):
    message = shop.fault("train", "tiny.yaml", "--name", "done", "data.files=nowhere.txt")
    assert "make resume RUN=done" in message
    assert "run name '../x'" in shop.fault("train", "tiny.yaml", "--name", "../x")


def test_line_breaks_in_what_is_given_stay_out_of_the_fault(shop):
    assert "run name 'a b'" in shop.fault("train", "tiny.yaml", "--name", "a\nb")
    assert "a b" in shop.fault("eval", "a\nb")
    assert "key=value" in shop.fault("count", "tiny.yaml", "a\nb")


def test_a_finished_run_has_nothing_to_resume(shop):
    assert "finished at step 6" in shop.fault("resume", "done")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def _foreign(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path)


def _newer(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["nano_moe"]["schema"] += 1
    torch.save(content, path)


@pytest.mark.parametrize("verb", ["resume", "eval", "sample"])
@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_truncated, "not a readable checkpoint"),
        (_foreign, "not one of nano_moe"),
        (_newer, "update nano_moe"),
        (Path.unlink, "no such checkpoint"),
    ],
)
def test_a_spoilt_checkpoint(shop, verb, spoil, part):
    for other in ("best", "previous"):
        Path(f"checkpoints/done/{other}.ckpt").unlink()
    spoil(Path("checkpoints/done/last.ckpt"))
    message = shop.fault(verb, "done")
    assert part in message and "last.ckpt" in message


@pytest.mark.parametrize("verb", ["eval", "sample"])
def test_a_recipe_changed_under_its_weights(shop, verb):
    shop.edit("checkpoints/done/recipe.yaml", "d_ff: 64", "d_ff: 128")
    message = shop.fault(verb, "done")
    assert "do not fit" in message and "recipe.yaml" in message


@pytest.mark.parametrize("verb", ["eval", "resume"])
def test_text_that_changed_since_the_training(shop, verb):
    content = torch.load("checkpoints/done/last.ckpt", weights_only=True)
    torch.save({**content, "global_step": 4}, "checkpoints/done/last.ckpt")
    shop.edit("text.txt", "fox", "cat")
    message = shop.fault(verb, "done")
    assert "checkpoints/done/manifest.json: trained on corpus" in message


def test_another_vocabulary_than_the_runs(shop):
    """The tokenizer is part of what a run was trained on, even over the same text."""
    shop.edit("checkpoints/done/recipe.yaml", "tokenizer: byte", "tokenizer: char")
    assert "text or vocabulary differ" in shop.fault("eval", "done")


@pytest.mark.parametrize(
    ("verb", "file", "content"),
    [
        ("eval", "manifest.json", "{"),
        ("eval", "manifest.json", None),
        ("compare", "manifest.json", None),
        ("compare", "metrics.csv", None),
        ("compare", "metrics.csv", "step,tokens\n1,2\n"),
        ("compare", "metrics.csv", ""),
        ("sample", "tokenizer.json", None),
        ("sample", "tokenizer.json", "{}"),
        ("eval", "recipe.yaml", "model: 3\n"),
        ("eval", "recipe.yaml", ""),
    ],
)
def test_a_damaged_run_folder(shop, verb, file, content):
    path = Path("checkpoints/done") / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert str(path) in shop.fault(verb, "done")


@pytest.mark.parametrize(
    "options",
    [
        "--tokens 0",
        "--temperature -1",
        "--temperature nan",
        "--top-k 0",
        "--top-p 0",
        "--top-p 1.1",
    ],
)
def test_sampling_settings_that_no_distribution_fits(shop, options):
    assert options.split()[0] in shop.fault("sample", "done", *options.split())


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("trian tiny.yaml", "no such verb"),
        ("train", "RECIPE"),
        ("resume", "RUN"),
        ("compare", "RUN"),
        ("count tiny.yaml --jsn", "--jsn"),
        ("sample done --tokens many", "--tokens"),
        ("eval done extra", "extra"),
        ("train tiny.yaml --name", "--name"),
    ],
)
def test_arguments_that_do_not_parse(shop, arguments, part):
    assert part in shop.fault(*arguments.split())


# --- disks ---------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(shop):
    Path("file").write_text("")
    assert "data.cache" in shop.fault("prepare", "tiny.yaml", "data.cache=file/inside")
    Path("checkpoints").rename("kept")
    Path("checkpoints").write_text("")
    assert "checkpoints: a file is where a folder should be" in shop.fault("train", "tiny.yaml")


def on_a_full_disk(work, *, after: int) -> tuple[int, str]:
    """Exit status and stderr of `work` in a child whose files end at `after` bytes."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
            import sys

            sys.stderr = os.fdopen(2, "w", buffering=1)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))
            os._exit(work())
        except BaseException:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    err = Path("stderr.txt").read_text()
    Path("stderr.txt").unlink()
    return status, err


def test_a_disk_too_full_for_the_first_checkpoint_leaves_no_run(shop):
    before = shop.files()
    status, err = on_a_full_disk(lambda: main(["train", "tiny.yaml", "--name", "x"]), after=50_000)
    assert status == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: checkpoints/x/last.ckpt: could not be written")
    assert shop.files() == before


def test_a_disk_too_full_for_prepared_tokens_leaves_none(shop):
    Path("text.txt").write_text("the old fox\n" * 5000)
    before = sorted(Path("cache").iterdir())
    status, err = on_a_full_disk(lambda: main(["prepare", "tiny.yaml"]), after=50_000)
    assert status == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: cache/text-byte-")
    assert sorted(Path("cache").iterdir()) == before


# --- starts that fail ----------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_run_folder(shop, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr("nano_moe.training.fit.Decoder", fail)
    before = shop.files()
    monkeypatch.setenv("NANO_MOE_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="no"):
        shop.run("train", "tiny.yaml", "--name", "x")
    assert shop.files() == before


def test_figures_that_are_not_finite_are_null_in_json(shop):
    """JSON has no NaN; a reader of another language would stop at it."""
    for name in ("best", "last"):
        path = Path(f"checkpoints/done/{name}.ckpt")
        content = torch.load(path, weights_only=True)
        content["state_dict"]["model.norm.weight"].fill_(torch.nan)
        torch.save(content, path)
    status, out, _ = shop.run("eval", "done", "--json")
    assert status == 0
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["ce"] is None and found["tokens"] > 0
