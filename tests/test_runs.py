"""Run folders: claimed once, found by name, read back only when they are ours and whole."""

import errno
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from nano_moe import checkpoints, runs
from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT, init_weights

RECIPE = Recipe.model_validate(
    {
        "model": {
            "vocab_size": 264,
            "context": 16,
            "n_layers": 1,
            "d_model": 16,
            "n_heads": 2,
            "d_ff": 32,
            "moe": {"n_experts": 2, "top_k": 1},
        },
        "data": {"files": ["text.txt"], "tokenizer": "byte"},
        "optim": {"lr": 0.01},
        "trainer": {"steps": 5, "batch_size": 2},
    }
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def create(stem: str = "tiny", name: str | None = None) -> runs.Run:
    return runs.create(RECIPE, stem=stem, name=name)


def fault(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- claiming ------------------------------------------------------------------------------------


def test_unnamed_runs_take_the_next_number_of_their_stem():
    assert [create().name, create().name, create("other").name] == ["tiny-1", "tiny-2", "other-1"]
    (runs.ROOT / "tiny-41").mkdir()
    (runs.ROOT / "tiny-99x").mkdir()
    (runs.ROOT / "xtiny-77").mkdir()
    assert create().name == "tiny-42"


def test_a_stem_with_pattern_characters_is_taken_literally():
    (runs.ROOT).mkdir()
    (runs.ROOT / "axb-7").mkdir()
    assert create("a.b").name == "a.b-1"


def test_a_number_taken_after_the_look_round_is_passed_over(monkeypatch):
    """The race itself: the listing shows nothing of what others have made meanwhile."""
    create()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    assert [create().name, create().name] == ["tiny-2", "tiny-3"]


def test_unnamed_runs_created_at_once_never_share_a_folder():
    workers, each = 8, 12
    together = threading.Barrier(workers)
    made: list[Path] = []

    def work():
        for _ in range(each):
            together.wait(timeout=20)
            made.append(create().path)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(set(made)) == workers * each
    assert all((path / "recipe.yaml").is_file() for path in made)


def test_one_name_asked_for_at_once_goes_to_one_process():
    reader, writer = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # all start when the parent closes its end
            try:
                create(name="mine")
                os._exit(0)
            except UserError:
                os._exit(3)
            finally:
                os._exit(99)
        children.append(child)
    os.close(writer)
    ends = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
    os.close(reader)
    assert ends == [0, 3, 3, 3, 3, 3]


def test_an_existing_name_is_refused_with_resume_offered_and_left_alone():
    run = create(name="mine")
    before = run.recipe_file.read_bytes()
    changed = RECIPE.model_copy(update={"seed": 1})
    message = fault(runs.create, changed, stem="tiny", name="mine")
    assert "make resume RUN=mine" in message and "checkpoints/mine" in message
    assert run.recipe_file.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/tmp/x", ".", "..", ".hidden", "", "-x", "a b", "é", "x" * 101]
)
def test_a_name_that_leaves_the_folder_or_hides_is_refused(folder, name):
    assert "use letters, digits" in fault(create, name=name)
    assert [p.name for p in folder.rglob("*") if p.name != "checkpoints"] == []


def test_the_stored_recipe_is_the_recipe():
    assert create().recipe() == RECIPE


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("recipes/mixtral.yaml", "mixtral"),
        ("checkpoints/mixtral-3/recipe.yaml", "mixtral"),
        ("checkpoints/my-run/recipe.yaml", "my-run"),
        ("checkpoints/deepseek-v3-12/recipe.yaml", "deepseek-v3"),
        ("my recipe é.yaml", "my-recipe"),
        (".yaml", "yaml"),
        ("-.yaml", "run"),
    ],
)
def test_unnamed_runs_are_called_after_their_recipe_or_the_run_it_came_from(path, stem):
    assert runs.stem_of(Path(path)) == stem
    assert create(runs.stem_of(Path(path))).name == f"{stem}-1"


# --- finding -------------------------------------------------------------------------------------


def test_a_run_is_found_by_name_and_by_path(folder, monkeypatch):
    run = create(name="mine")
    places = (
        "mine",
        "checkpoints/mine",
        "checkpoints/mine/",
        "./checkpoints/mine",
        folder / run.path,
    )
    assert {runs.find(str(place)).path.resolve() for place in places} == {run.path.resolve()}
    monkeypatch.chdir(run.path)
    assert runs.find(".").name == "mine"


def test_a_run_under_the_root_comes_before_a_folder_of_that_name(folder):
    run = create(name="tests")
    (folder / "tests").mkdir()
    assert runs.find("tests").path == run.path


def test_a_missing_run_names_the_nearest_ones():
    for name in ("mixtral-1", "mixtral-2", "dense-1"):
        create(name=name)
    message = fault(runs.find, "mixtrel-2")
    assert message.startswith("run 'mixtrel-2': no such run; nearest: mixtral-2, mixtral-1")
    assert "dense-1" in fault(runs.find, "zzz")


def test_a_missing_run_where_there_is_none_says_so():
    assert "holds no run yet" in fault(runs.find, "x")


@pytest.mark.parametrize("name", ["other", ".", "..", "", "checkpoints/other"])
def test_a_folder_that_is_no_run_is_told_apart(folder, name):
    create(name="mine")
    (folder / "other").mkdir()
    (runs.ROOT / "other").mkdir()
    assert "not a run folder" in fault(runs.find, name)


# --- files of a run ------------------------------------------------------------------------------


def test_json_that_is_missing_or_damaged_is_one_line():
    run = create()
    assert "missing" in fault(run.manifest)
    run.manifest_file.write_text('{"seed": ')
    assert "not JSON" in fault(run.manifest)
    run.manifest_file.write_bytes(b"\xff\xfe")
    assert "not JSON" in fault(run.manifest)
    run.manifest_file.write_text('{"corpus": null}')
    assert "corpus: not what training writes" in fault(run.manifest)


def test_a_failed_write_leaves_the_file_as_it_was_and_nothing_beside_it(folder, monkeypatch):
    path = folder / "a.json"
    runs.write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("nano_moe.files.os.replace", "nano_moe.files.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(OSError, match="No space"):
                runs.write_json(path, {"a": 2})
        assert path.read_bytes() == before
        assert os.listdir(folder) == ["a.json"]


# --- checkpoints ---------------------------------------------------------------------------------


def ours(**changes) -> dict:
    model = init_weights(GPT(RECIPE.model), seed=1)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        "state_dict": weights,
        "global_step": 3,
        "nano_moe": {"schema": runs.SCHEMA, "recipe": RECIPE.model_dump(mode="json")},
        **changes,
    }


def saved(content, path: Path = Path("x.ckpt")) -> Path:
    torch.save(content, path)
    return path


class Opens:
    """A pickle that would create a file when it is loaded carelessly."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_a_checkpoint_of_ours_reads_back_equal():
    content = ours()
    read = checkpoints.read_checkpoint(saved(content))
    assert read["nano_moe"] == content["nano_moe"]
    assert all(torch.equal(t, read["state_dict"][k]) for k, t in content["state_dict"].items())


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_line(keep):
    whole = saved(ours()).read_bytes()
    Path("x.ckpt").write_bytes(whole[: int(len(whole) * keep)])
    message = fault(checkpoints.read_checkpoint, Path("x.ckpt"))
    assert message.startswith("x.ckpt: not a readable checkpoint (")
    assert "use another checkpoint" in message and len(message) < 300


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"hello\n", b"\x80\x04.", b"PK\x03\x04", bytes(range(256))])
def test_a_file_that_is_no_checkpoint_is_one_line(content):
    Path("x.ckpt").write_bytes(content)
    assert "not a readable checkpoint" in fault(checkpoints.read_checkpoint, Path("x.ckpt"))


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(2)},
        {"state_dict": {"weight": torch.ones(2)}, "epoch": 1},
        [torch.ones(2)],
        torch.ones(2),
        None,
        ours(nano_moe=3),
        ours(nano_moe={}),
        ours(nano_moe={"schema": "new"}),
    ],
)
def test_a_torch_file_of_another_kit_is_called_foreign(content):
    assert "not one of nano_moe" in fault(checkpoints.read_checkpoint, saved(content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("with_torch", [True, False])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(with_torch):
    content = ours(extra=Opens())
    if with_torch:
        saved(content)
    else:
        Path("x.ckpt").write_bytes(pickle.dumps(content))
    assert "not a readable checkpoint" in fault(checkpoints.read_checkpoint, Path("x.ckpt"))
    assert not Path("executed").exists()
    if with_torch:
        torch.load("x.ckpt", weights_only=False)
    else:
        pickle.loads(Path("x.ckpt").read_bytes())
    assert Path("executed").exists(), "the pickle is harmless, so this test shows nothing"


def test_a_newer_schema_is_refused_with_both_numbers():
    message = fault(checkpoints.read_checkpoint, saved(ours(nano_moe={"schema": runs.SCHEMA + 1})))
    assert f"schema {runs.SCHEMA + 1}" in message and f"up to {runs.SCHEMA}" in message
    assert "update nano_moe" in message


def test_a_missing_checkpoint_is_one_line():
    assert "no such checkpoint" in fault(checkpoints.read_checkpoint, Path("x.ckpt"))
    assert "no such checkpoint" in fault(checkpoints.read_checkpoint, Path("."))


# --- loading a model -----------------------------------------------------------------------------


def test_a_loaded_model_is_the_saved_one_and_the_best_one_where_there_is_one():
    run = create()
    worse, better = ours(), ours(global_step=2)
    better["state_dict"] = {k: v + 1 for k, v in better["state_dict"].items()}
    saved(worse, run.last)
    for content, step in ((worse, 3), (better, 2)):
        recipe, model, found = checkpoints.load_model(run)
        assert (recipe, found, model.training) == (RECIPE, step, False)
        weights = {f"model.{k}": v for k, v in model.state_dict().items()}
        assert weights.keys() == content["state_dict"].keys()
        assert all(torch.equal(v, content["state_dict"][k]) for k, v in weights.items())
        saved(better, run.best)


@pytest.mark.parametrize(
    "change", [("vocab_size: 264", "vocab_size: 300"), ("n_layers: 1", "n_layers: 2")]
)
def test_weights_that_do_not_fit_the_recipe_are_one_line_with_both_files(change):
    run = create()
    saved(ours(), run.last)
    text = run.recipe_file.read_text()
    assert change[0] in text
    run.recipe_file.write_text(text.replace(*change))
    message = fault(checkpoints.load_model, run)
    assert str(run.last) in message and str(run.recipe_file) in message


def test_a_run_of_one_corpus_is_not_judged_on_another():
    class Corpus:
        sha256, path = "b" * 64, Path("data/x")

    run = create()
    run.manifest_file.write_text(json.dumps({"corpus": {"sha256": "a" * 64}}))
    message = fault(runs.check_corpus, run, Corpus)
    assert "aaaaaaaaaaaa" in message and "bbbbbbbbbbbb" in message
    Corpus.sha256 = "a" * 64
    runs.check_corpus(run, Corpus)
    run.manifest_file.write_text("{}")
    assert "trained on corpus" in fault(runs.check_corpus, run, Corpus)
