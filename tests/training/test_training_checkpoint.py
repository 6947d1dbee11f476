"""Checkpoints are whole or absent, and trouble in training leaves the last good one."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from nano_moe.errors import UserError
from nano_moe.training import module
from nano_moe.training.checkpoint import AtomicCheckpointIO
from nano_moe.training.module import Decoder

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("write failed"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_save_that_fails_half_way_leaves_the_file_before_it(tmp_path, monkeypatch, error):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(9)}, path)
    before = path.read_bytes()
    save = torch.save

    def half(content, file):
        save(content, file)
        file.truncate(file.tell() // 2)
        raise error

    monkeypatch.setattr(torch, "save", half)
    for target in (path, tmp_path / "best.ckpt"):
        with pytest.raises(UserError) as fault:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(9)}, target)
        message = str(fault.value)
        assert message.startswith(f"{target}: could not be written (") and "\n" not in message
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_save_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """A power cut may lose what was not synced, so the order of the calls is the property."""
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))
        )
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(9)}, tmp_path / "x.ckpt")
    assert calls[:2] == ["fsync", "replace"]
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["weights"].sum() == 9


def test_removing_a_checkpoint_twice_is_fine(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(9)}, tmp_path / "x.ckpt")
    for _ in range(2):
        AtomicCheckpointIO().remove_checkpoint(tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", FULL)
def test_a_disk_that_fills_up_in_training_leaves_a_run_to_resume(workshop, monkeypatch, error):
    recipe = workshop.recipe(trainer__steps=8)
    whole, _ = workshop.train(recipe, "whole")

    def fill():
        monkeypatch.setattr(torch, "save", fail)

    def fail(content, file):
        raise error

    save = torch.save
    workshop.during(5, fill)
    with pytest.raises(UserError, match="free some space and resume"):
        workshop.train(recipe, "run")
    monkeypatch.setattr(torch, "save", save)
    run = type(whole)(Path("checkpoints/run"))
    assert workshop.checkpoint(run.last)["global_step"] == 3
    assert not list(run.path.glob("*.tmp")) and not list(run.path.glob(".*"))
    assert workshop.resume(run).step == 8
    weights = [workshop.checkpoint(r.last)["state_dict"] for r in (run, whole)]
    assert workshop.differences(*weights) == []


@pytest.mark.parametrize("kind", ["dense", "softmax"])
def test_last_ckpt_can_be_loaded_by_anyone_with_weights_only(workshop, kind):
    run, _ = workshop.train(workshop.recipe(kind, trainer__steps=2))
    content = torch.load(run.last, weights_only=True)
    assert content["nano_moe"]["recipe"] == run.recipe().model_dump(mode="json")
    names = {name for name, _ in Decoder(run.recipe()).state_dict().items()}
    assert content["state_dict"].keys() == names


# --- what is not finite --------------------------------------------------------------------------


def spoil_at(step: int, spoil, workshop, monkeypatch) -> None:
    """From the middle of `step` - 1 on, cross-entropy goes through `spoil`."""
    original = module.cross_entropy

    def act():
        monkeypatch.setattr(module, "cross_entropy", lambda *args: spoil(original(*args)))

    workshop.during(step - 1, act)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ce: ce * torch.nan,
        lambda ce: ce * torch.inf,
        lambda ce: ce + torch.nan,  # the gradients stay finite
        lambda ce: ce + torch.inf,
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(workshop, monkeypatch, spoil):
    spoil_at(6, spoil, workshop, monkeypatch)
    with pytest.raises(UserError) as fault:
        workshop.train(workshop.recipe("softmax"), "run")
    message = str(fault.value)
    assert message.startswith("step 6: loss is ") and "\n" not in message
    for part in ("checkpoints/run/nonfinite.json", "checkpoints/run/last.ckpt", "optim.lr"):
        assert part in message
    content = workshop.checkpoint(Path("checkpoints/run/last.ckpt"))
    assert content["global_step"] == 3
    assert all(torch.isfinite(weight).all() for weight in content["state_dict"].values())


def test_the_statistics_of_a_stop_name_each_parameter(workshop, monkeypatch):
    original = Decoder.on_before_optimizer_step

    def spoil(decoder, optimizer):
        if decoder.global_step == 3:
            decoder.model.blocks[1].ffn.experts.down.grad[2, 0, 0] = torch.nan
        original(decoder, optimizer)

    monkeypatch.setattr(Decoder, "on_before_optimizer_step", spoil)
    with pytest.raises(UserError, match=r"first in blocks\.1\.ffn\.experts\.down"):
        workshop.train(workshop.recipe("softmax"), "run")
    found = json.loads(
        Path("checkpoints/run/nonfinite.json").read_text(), parse_constant=pytest.fail
    )
    rows = {row["parameter"]: row for row in found["parameters"]}
    model = Decoder(workshop.recipe("softmax")).model
    assert rows.keys() == {name for name, _ in model.named_parameters()}
    bad = [name for name, row in rows.items() if row["gradient_max"] is None]
    assert bad == ["blocks.1.ffn.experts.down"]
    assert all(row["weight_max"] > 0 for row in rows.values())


@pytest.mark.parametrize("lr", [1e6, 1e20])
@pytest.mark.parametrize("save_every", [1, 3])
def test_an_absurd_learning_rate_stops_the_run_and_no_broken_weights_are_kept(
    workshop, lr, save_every
):
    recipe = workshop.recipe(optim__lr=lr, trainer__save_every=save_every, trainer__val_every=1)
    with pytest.raises(UserError, match=r"^step \d: ") as fault:
        workshop.train(recipe, "run")
    assert "checkpoints/run/last.ckpt" in str(fault.value)
    for name in ("last.ckpt", "best.ckpt"):
        path = Path("checkpoints/run") / name
        if name == "last.ckpt" or path.exists():
            weights = workshop.checkpoint(path)["state_dict"].values()
            assert all(torch.isfinite(weight).all() for weight in weights)
