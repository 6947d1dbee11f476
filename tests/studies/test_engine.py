"""Runs are cached, resumed and repeated to the bit; a fault costs one run and not the others."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nano_moe import memory
from nano_moe.errors import UserError
from nano_moe.studies import catalogue, engine, keys, plan, results, schema, worker

MEASURED = ("created", "seconds", "memory_gb", "machine")


@pytest.fixture
def todo(written, small, tmp_path, monkeypatch):
    """todo(**fields) -> the tasks of the study, in a folder of the test's own."""
    monkeypatch.setattr(engine, "ROOT", tmp_path / "studies")

    def make(**fields):
        path = written()
        extra = {**small, **{name.replace("__", "."): value for name, value in fields.items()}}
        return engine.tasks(plan.plan(path, schema.load(path), extra), engine.ROOT)

    return make


def figures(task):
    return {k: v for k, v in engine.read_result(task.job).items() if k not in MEASURED}


def test_finished_runs_are_not_run_again_and_one_recipe_is_one_run(todo, monkeypatch):
    first = todo()
    engine.run_here(first)
    assert len({task.job.folder for task in first}) == 4
    monkeypatch.setattr(engine, "work", lambda job: pytest.fail("trained again"))
    engine.run_here(todo())
    assert (
        len({task.job.folder for task in todo(model__d_ff=32, model__moe=None, optim__lr=1)}) == 2
    )


def test_a_cache_that_does_not_empty_fails_before_any_training(todo, monkeypatch):
    tasks = todo()
    last = replace(tasks[-1], job=replace(tasks[-1].job, measure=True, expert_budget="25%"))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    monkeypatch.setattr(engine, "_start", lambda *_: pytest.fail("began"))
    with pytest.raises(UserError, match="cannot be timed"):
        engine.run_all("study", [*tasks[:-1], last])


RECIPES = Path(__file__).parent.parent.parent / "recipes"
UPCYCLED = """    upcycled:
      recipe: {recipes}/mixtral.yaml
      start_from: dense
      fields: {{model.moe.d_expert: 64, model.moe.n_experts: 16}}
  comparisons:"""


def test_a_run_starts_from_the_source_of_the_next_seed(written, small, tmp_path):
    path = written(("  comparisons:", UPCYCLED.format(recipes=RECIPES)))
    study = schema.load(path)
    todo = engine.tasks(plan.plan(path, study, small), tmp_path / "studies")
    found = {(task.planned.member, task.planned.seed): task for task in todo}
    assert list(found)[2] == ("upcycled", 1)
    engine.run_here(todo)
    for seed, other in ((1, 2), (2, 1)):
        manifest = found["upcycled", seed].job.run.manifest()
        assert manifest["init_from"]["run"] == found["dense", other].job.run.name
    content = results.collect("study", study, todo)
    flops = {name: member["train_flops"] for name, member in content["members"].items()}
    alone = plan.train_flops(found["upcycled", 1].planned.recipe)
    assert flops["upcycled"] == alone + flops["dense"]


def test_a_look_at_a_finished_run_trains_nothing(written, small, tmp_path, monkeypatch):
    path = written()
    plain = plan.plan(path, schema.load(path), small)
    root = tmp_path / "studies"
    engine.run_here(engine.tasks(plain, root))
    text = path.read_text().replace("sparse:\n", "sparse:\n      look: leak\n")
    path.write_text(text)
    study = schema.load(path)
    todo = engine.tasks(plan.plan(path, study, small), root)
    assert [task.job.done for task in todo] == [True, False, True, False]
    monkeypatch.setattr(worker, "_train", lambda *a: pytest.fail("trained again"))
    engine.run_here(todo)
    content = results.collect("study", study, todo)
    own = [run for run in content["runs"] if run["member"] == "sparse"]
    assert all(run["ce_own_future"] == run["ce_other_future"] for run in own)
    assert set(content["looks"]) == {"sparse"}


@pytest.mark.slow
def test_a_study_killed_half_way_ends_with_equal_figures(todo, tmp_path):
    steps = {"trainer__steps": 60, "trainer__save_every": 5}
    whole = todo(**steps)
    assert engine.run_all("whole", whole, workers=1) == {}
    expected = [figures(task) for task in whole]
    root = tmp_path / "again"
    again = [
        replace(t, job=replace(t.job, folder=str(root / os.path.basename(t.job.folder))))
        for t in whole
    ]  # fmt: skip
    for task in again[:2]:  # a dense run and a sparse one
        process = engine._start(task)
        while task.spent() == 0:
            time.sleep(0.01)
            assert process.poll() is None, "ended before it could be killed"
        process.kill()
        process.wait()
        assert task.spent() < 1
    assert engine.run_all("again", again, workers=2) == {}
    assert [figures(task) for task in again] == expected


def test_a_worker_stops_with_a_checkpoint_when_its_parent_is_gone(todo):
    task = todo(trainer__steps=100_000, trainer__save_every=100_000)[0]
    with engine._alone() as lock:
        process = engine._start(task, lock)
    while task.spent() == 0:
        time.sleep(0.05)
        assert process.poll() is None
    with pytest.raises(UserError, match="a stopped one still saves"), engine._alone():
        pass  # it would train the same run in the same folder
    process.stdin.close()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert task.job.run.last.is_file() and not task.job.result.is_file()


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_are_kept(todo):
    tasks = todo()
    broken = engine.Path(tasks[0].job.folder)
    broken.mkdir(parents=True)
    (broken / "recipe.yaml").write_text("seed: 1\n")
    (broken / "last.ckpt").write_text("cut")
    (fault,) = engine.run_all("study", tasks[:1]).values()
    assert "recipe.yaml: model: missing" in fault
    (broken / "recipe.yaml").unlink()
    engine.shutil.rmtree(broken)
    engine._claim(tasks[0])
    tasks[0].job.run.last.write_text("cut")
    failed = engine.run_all("study", tasks[:2], workers=2)
    assert list(failed) == ["dense, seed 1"] and "manifest.json" in failed["dense, seed 1"]
    assert [task.job.result.is_file() for task in tasks[:2]] == [False, True]


def test_two_studies_at_once_are_refused(todo):
    todo()
    with engine._alone(), pytest.raises(UserError, match="another study is running"):
        with engine._alone():
            pass


def test_a_damaged_result_is_named(todo):
    task = todo()[0]
    os.makedirs(task.job.folder)
    for text in ("{", json.dumps({"key": "another"})):
        task.job.result.write_text(text)
        with pytest.raises(UserError, match="result.json"):
            engine.read_result(task.job)


def test_a_key_is_of_what_decides_the_weights(todo, monkeypatch):
    recipe = todo()[0].planned.recipe

    def key(recipe=recipe, corpus="text", threads=1):
        return keys.run_key(recipe, corpus, threads)

    moved = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"cache": "elsewhere"})}
    )
    assert key(moved) == key()
    others = [
        key(recipe.model_copy(update={"seed": 99})),
        key(corpus="other text"),
        key(threads=2),
    ]
    monkeypatch.setattr(keys, "sources", lambda: "edited")
    measured = [
        keys.run_key(recipe, "text", 1, measure=True, expert_budget=budget)
        for budget in (None, "all", "25%")
    ]
    assert len({key(), *others, *measured}) == 7
    assert key() not in others


def test_sources_are_the_rooms_that_decide_weights(tmp_path, monkeypatch):
    for room in ("model", "training", "text", "cli"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text(f"# {room}")
    monkeypatch.setattr(keys, "PACKAGE", tmp_path)

    def now():
        keys.sources.cache_clear()
        return keys.sources()

    try:
        before = now()
        (tmp_path / "cli" / "a.py").write_text("# another")
        assert now() == before
        (tmp_path / "text" / "a.py").write_text("# another")
        edited = now()
        (tmp_path / "text" / "a.py").rename(tmp_path / "text" / "b.py")
        assert len({before, edited, now()}) == 3
    finally:
        keys.sources.cache_clear()


def test_results_are_of_the_runs(todo, written):
    tasks = todo()
    engine.run_here(tasks)
    path = written()
    content = results.collect("study", schema.load(path), tasks)
    ce = {(run["member"], run["seed"]): run["ce"] for run in content["runs"]}
    (compared,) = content["comparisons"]
    gains = {str(seed): ce["dense", seed] - ce["sparse", seed] for seed in (1, 2)}
    assert compared["gains"] == pytest.approx(gains)
    assert compared["mean"] == pytest.approx(sum(gains.values()) / 2)
    assert len(content["curves"]["sparse"]["mean"]) == 4
    assert results.introduced(path, content["rule"]) is None  # the file is not under git
    moe = content["members"]["sparse"]["recipe"]["model"]["moe"]
    assert moe["n_experts"] == 16 and "cache" not in content["members"]["sparse"]["recipe"]["data"]
    loads = [layer["load"] for run in content["runs"] for layer in run["routing"]]
    assert len(loads) == 2 and all(sum(load) == pytest.approx(1, abs=1e-3) for load in loads)
    json.dumps(content, allow_nan=False)


CHILD = """
import json, signal, sys
from pathlib import Path
from nano_moe.cli.main import terminable
from nano_moe.studies import engine, plan, schema
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
path, engine.ROOT = Path(sys.argv[1]), Path(sys.argv[2])
tasks = engine.tasks(plan.plan(path, schema.load(path), json.loads(sys.argv[3])), engine.ROOT)
try:
    with terminable():
        engine.run_all("study", tasks, workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_leaves_checkpoints_and_no_worker(written, small, tmp_path, number):
    extra = {**small, "trainer.steps": 100_000, "trainer.save_every": 100_000}
    path, root = written(), tmp_path / "studies"
    arguments = [sys.executable, "-c", CHILD, str(path), str(root), json.dumps(extra)]
    study = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        while sum(len(rows(run)) > 1 for run in root.glob("*-*")) < 2:
            time.sleep(0.1)
            assert study.poll() is None
        study.send_signal(number)
        assert study.wait(timeout=60) == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    finally:
        study.kill()
    for _ in range(600):
        if sum((run / "last.ckpt").is_file() for run in root.glob("*-*")) == 2:
            break
        time.sleep(0.1)
    assert settles(lambda: [rows(run) for run in root.glob("*-*")]), "a worker goes on"
    assert not list(root.glob("*/result.json"))


def settles(read, within=60):
    """Whether what is read stops changing."""
    before = read()
    for _ in range(within):
        time.sleep(1)
        now = read()
        if now == before:
            return True
        before = now
    return False


def rows(run):
    """What a run has logged so far."""
    metrics = run / "metrics.csv"
    return metrics.read_text().splitlines() if metrics.is_file() else []


def test_peak_memory_is_of_the_process_and_not_of_its_parent():
    code = "from nano_moe.memory import peak_resident as p; print(p())"
    held = bytearray(1_500_000_000)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert memory.peak_resident() > len(held) > 2 * int(child.stdout)


def test_results_of_the_gpu_tier_say_so_and_name_the_rule_that_was_committed(
    todo, written, monkeypatch
):
    small = schema.load(path := written())
    large = small.model_copy(update={"source": "a rule of its own"})
    tasks = todo()
    engine.run_here(tasks)
    monkeypatch.setattr(catalogue, "check_names", lambda found: None)  # there is no grid here
    monkeypatch.setattr(engine, "tasks", lambda planned: tasks)
    monkeypatch.setattr(results, "introduced", lambda path, rule: f"commit of {rule}")
    content = catalogue.run(catalogue.Found("study", path, large, small)).results
    assert content["tier"] == "gpu"
    assert content["rule"] == small.rule != large.rule
    assert content["rule_commit"] == f"commit of {content['rule']}"
