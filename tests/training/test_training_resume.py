"""Stop anywhere, resume, and end bit for bit where an uninterrupted training ends."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from nano_moe import files, ranks
from nano_moe.errors import UserError
from nano_moe.training import module, signals
from nano_moe.training.checkpoint import SaveLast
from nano_moe.training.module import Decoder


def assert_same_course(workshop, broken, whole):
    """Everything a run leaves is equal, clocks and Lightning's own loop counters left out."""
    for name in ("last.ckpt", "best.ckpt"):
        mine, theirs = (workshop.checkpoint(run.path / name) for run in (broken, whole))
        mine.pop("loops"), theirs.pop("loops")
        assert workshop.differences(mine, theirs) == []
    assert workshop.rows(broken) == workshop.rows(whole)


@pytest.mark.parametrize(
    ("kind", "accumulate", "stops"),
    [
        ("dense", 1, [1, 7]),
        ("dense", 2, [3, 5, 11]),  # neither 7, 5 nor 11 divides by an interval below
        ("softmax", 1, [5, 6]),
        ("softmax", 2, [4, 9]),
        ("sigmoid", 1, [2, 11]),
        ("sigmoid", 2, [7]),
        ("schemes", 2, [5]),
        ("hash", 1, [3]),
    ],
)
def test_a_run_stopped_by_signals_and_resumed_equals_an_uninterrupted_one(
    workshop, kind, accumulate, stops
):
    changes = {"trainer__steps": 12, "trainer__accumulate": accumulate, "optim__warmup_steps": 3}
    recipe = workshop.recipe(kind, **changes)
    workshop.observe()
    whole, _ = workshop.train(recipe, "whole")
    expected = workshop.seen()
    assert len(expected) == 12 * accumulate  # 48 or 96 windows of 37 an epoch

    for i, step in enumerate(stops):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        workshop.signal_at(step, number, micro_batch=i % accumulate)
    broken, result = workshop.train(recipe, "broken")
    assert (result.step, result.stopped_by, result.evaluation) == (stops[0], "SIGTERM", None)
    for step in [*stops[1:], 12]:
        result = workshop.resume(broken)
        assert result.step == step

    assert result.stopped_by is None
    assert len(workshop.batches) == len(expected)
    assert all(map(torch.equal, workshop.seen(), expected))
    assert_same_course(workshop, broken, whole)


def test_random_draws_of_a_step_go_on_where_they_were(workshop, monkeypatch):
    """Whatever a step draws (router noise, jitter) goes on bitwise."""
    draws, original = [], Decoder.training_step

    def training_step(decoder, batch, batch_idx):
        draws.append(torch.rand(()).item())
        return original(decoder, batch, batch_idx)

    monkeypatch.setattr(Decoder, "training_step", training_step)
    recipe = workshop.recipe()
    workshop.train(recipe, "whole")
    whole = draws[:]
    draws.clear()
    workshop.signal_at(4)
    run, _ = workshop.train(recipe, "broken")
    workshop.resume(run)
    assert draws == whole and len(set(whole)) == 10


def test_a_resumed_run_remembers_its_best(workshop, monkeypatch):
    """The loss rises from step 5 on, so what comes after the resume must not become the best."""
    learned = module.cross_entropy

    def unlearn():
        monkeypatch.setattr(module, "cross_entropy", lambda *args: -learned(*args))

    workshop.during(4, unlearn)
    workshop.signal_at(6)
    run, _ = workshop.train(workshop.recipe(trainer__val_every=1))
    best = workshop.checkpoint(run.best)["global_step"]
    assert 1 < best < 6
    workshop.resume(run)
    assert workshop.checkpoint(run.best)["global_step"] == best


def test_two_trainings_of_one_seed_are_equal_and_of_two_seeds_are_not(workshop):
    """Guards the test above: its comparison does see a difference."""
    runs = [
        workshop.train(workshop.recipe("softmax", trainer__steps=3, seed=seed), f"run{i}")[0]
        for i, seed in enumerate((5, 5, 6))
    ]
    weights = [workshop.checkpoint(run.last)["state_dict"] for run in runs]
    assert workshop.differences(weights[0], weights[1]) == []
    assert len(workshop.differences(weights[0], weights[2])) > 5


@pytest.mark.parametrize("when", ["in a step", "in writing the checkpoint", "before the rename"])
def test_a_killed_run_resumes_on_course(workshop, monkeypatch, when):
    """kill -9 at step 8: the checkpoint of step 6 is whole, the later rows are written anew."""
    recipe = workshop.recipe("softmax", trainer__steps=12)
    whole, _ = workshop.train(recipe, "whole")

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def training():
        if when == "in a step":
            workshop.during(8, die)
        else:
            workshop.during(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
            workshop.during(8, break_saving)
        workshop.train(recipe, "broken")

    def break_saving():
        if when == "before the rename":
            monkeypatch.setattr(files.os, "replace", lambda *paths: die())
        else:
            save = torch.save
            monkeypatch.setattr(torch, "save", lambda c, file: (save(c["loops"], file), die()))

    assert workshop.in_child(training) == -signal.SIGKILL
    broken = type(whole)(whole.path.with_name("broken"))
    assert workshop.checkpoint(broken.last)["global_step"] == 6
    rows_of_8 = set() if when == "in a step" else {8}
    assert {int(row["step"]) for row in workshop.rows(broken)} == {2, 4, 6} | rows_of_8

    assert workshop.resume(broken).step == 12
    assert_same_course(workshop, broken, whole)


def test_a_crash_in_the_middle_of_a_step_leaves_a_resumable_run(workshop):
    recipe = workshop.recipe("sigmoid")
    whole, _ = workshop.train(recipe, "whole")
    workshop.during(8, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workshop.train(recipe, "broken")
    broken = type(whole)(whole.path.with_name("broken"))
    workshop.resume(broken)
    assert_same_course(workshop, broken, whole)


def test_a_signal_in_the_last_step_is_a_finished_run(workshop):
    workshop.signal_at(10)
    _, result = workshop.train(workshop.recipe())
    assert (result.step, result.stopped_by) == (10, None)
    assert result.evaluation is not None


@pytest.mark.parametrize("end", ["at the last step", "by a signal", "by a crash"])
def test_a_training_leaves_the_signal_handlers_as_it_found_them(workshop, end):
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in ours]
    if end == "by a signal":
        workshop.signal_at(2)
    if end == "by a crash":
        workshop.during(2, lambda: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        workshop.train(workshop.recipe(trainer__steps=3))
    assert [signal.getsignal(number) for number in ours] == before


def test_a_signal_while_processes_agree_to_go_on_stops_the_next_step(workshop, monkeypatch):
    """Most of a step may be spent waiting for others there."""
    largest, asked = ranks.largest, []

    def interrupted(number):
        asked.append(number)
        agreed = largest(number)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    monkeypatch.setattr(signals.ranks, "largest", interrupted)
    monkeypatch.setattr(SaveLast, "_save", lambda *arguments: None)  # asks, too
    _, result = workshop.train(workshop.recipe("dense", trainer__steps=12), "signalled")
    assert (result.step, result.stopped_by) == (6, "SIGTERM")


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(workshop):
    workshop.signal_at(8, signal.SIGINT)
    workshop.signal_at(8, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        workshop.train(workshop.recipe(), "run")
    assert workshop.checkpoint(Path("checkpoints/run/last.ckpt"))["global_step"] == 6


def test_resuming_on_changed_text_is_refused_and_touches_nothing(workshop):
    workshop.signal_at(5)
    run, _ = workshop.train(workshop.recipe())
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with open("text.txt", "a") as file:
        file.write("one more line\n")
    with pytest.raises(UserError, match="trained on corpus") as error:
        workshop.resume(run)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_resume_refuses_a_recipe_that_was_changed_and_touches_nothing(workshop):
    recipe = workshop.recipe("softmax", trainer__steps=6)
    workshop.during(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run, _ = workshop.train(recipe, "run")
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(re.sub(r"\n  lr: .*", "\n  lr: 0.5", text))
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(UserError, match=r"optim\.lr was changed since"):
        workshop.resume(run)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_run_begun_before_a_field_existed_resumes_with_its_default(workshop):
    workshop.signal_at(3)
    run, _ = workshop.train(workshop.recipe("softmax", trainer__steps=6), "run")
    checkpoint = workshop.checkpoint(run.last)
    del checkpoint["nano_moe"]["recipe"]["model"]["activation"]
    del checkpoint["nano_moe"]["recipe"]["model"]["moe"]["n_groups"]
    torch.save(checkpoint, run.last)
    assert workshop.resume(run).step == 6


def test_resume_refuses_a_recipe_of_another_version_and_touches_nothing(workshop):
    workshop.signal_at(3)
    run, _ = workshop.train(workshop.recipe("softmax", trainer__steps=6), "run")
    checkpoint = workshop.checkpoint(run.last)
    checkpoint["nano_moe"]["recipe"]["model"]["of_a_later_version"] = 1
    torch.save(checkpoint, run.last)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(UserError, match="none of this version"):
        workshop.resume(run)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_resume_refuses_metrics_of_other_columns_and_keeps_them(workshop):
    recipe = workshop.recipe(trainer__steps=6)
    workshop.during(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run, _ = workshop.train(recipe, "run")
    run.metrics_file.write_text("step,other\n1,2\n")
    with pytest.raises(UserError, match="not this version's columns"):
        workshop.resume(run)
    assert run.metrics_file.read_text() == "step,other\n1,2\n"


def test_resume_removes_what_a_killed_save_left(workshop):
    recipe = workshop.recipe(trainer__steps=6)
    workshop.during(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run, _ = workshop.train(recipe, "run")
    (run.path / ".last.ckpt.123.tmp").write_bytes(b"half")
    workshop.resume(run)
    assert not list(run.path.glob(".*.tmp"))
