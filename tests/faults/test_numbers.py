"""Numbers that go wrong: named when they do, and the run goes on where it was well."""

import json
from pathlib import Path

import pytest
import torch
from kit import times, verb

from nano_moe.model.router import Router
from nano_moe.runs import Run
from nano_moe.training.module import Decoder


def warnings_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("WARNING")]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [17, 2, 25, 33][: times(1, 4)])
def test_a_number_that_is_none_is_named_and_the_run_goes_on(
    course, ledger, monkeypatch, step, value
):
    """At the step where it comes up, before it reaches a weight."""
    original = Decoder.on_before_optimizer_step
    names = [known for known, _ in Decoder(course.recipe).model.named_parameters()]
    name = names[step % len(names)]

    def spoil(decoder, optimizer):
        if decoder.global_step == step - 1:
            dict(decoder.model.named_parameters())[name].grad.view(-1)[3] = value
        original(decoder, optimizer)

    with ledger.attempt("NaN or infinity in a gradient at step n"):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "on_before_optimizer_step", spoil)
            status, _, lines = verb("train", "tiny.yaml", "--name", "x")
        assert status == 2
        assert f"error: step {step}: loss is" in lines[-1] and f"first in {name}" in lines[-1]
        run = Run(Path("checkpoints/x"))
        rows = json.loads((run.path / "nonfinite.json").read_text())["parameters"]
        assert [row["parameter"] for row in rows if row["gradient_max"] is None] == [name]
        assert course.check(run) < step
        course.go_on(run)
        course.check_end(run)


@pytest.mark.parametrize("step", [25, 30, 35][: times(1, 3)])
def test_a_gradient_spike_is_named_clipped_and_passed(course, ledger, monkeypatch, step):
    original, clip, norms = Decoder.training_step, Decoder.configure_gradient_clipping, {}

    def clipped(decoder, *arguments, **named):
        clip(decoder, *arguments, **named)
        grads = [weight.grad for weight in decoder.parameters()]
        norms[decoder.global_step + 1] = torch.nn.utils.get_total_norm(grads).item()

    def spike(decoder, batch, batch_idx):
        output = original(decoder, batch, batch_idx)
        if decoder.global_step == step - 1:
            output["loss"] = output["loss"] * 1000
        return output

    with ledger.attempt("gradient spike"):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "training_step", spike)
            patch.setattr(Decoder, "configure_gradient_clipping", clipped)
            status, out, lines = verb("train", "tiny.yaml", "--name", "x", "--json")
        (told,) = warnings_of(lines)
        assert told.startswith(f"WARNING: step {step}: the gradient norm is ")
        assert "times the usual" in told and told.endswith("; clipped to 1")
        assert norms[step] == pytest.approx(1, rel=1e-3)
        assert status == 0 and json.loads(out)["ce"] < 4  # untrained: 5.6


def test_a_healthy_run_warns_of_nothing(course):
    status, _, lines = verb("train", "tiny.yaml", "--name", "x")
    assert status == 0 and [line for line in warnings_of(lines) if "gradient" in line] == []
    course.check_end(Run(Path("checkpoints/x")))


def test_an_expert_starved_on_purpose_is_named_and_fed_again(course, ledger, monkeypatch):
    """Its logits are lowered in steps 11 to 24; the warning names layer and expert."""
    original, step = Router.logits, [0]
    begin, shares = Decoder.training_step, {}

    def starve(router, x, past=None):
        logits = original(router, x, past)
        if router.training and 10 <= step[0] < 24 and router is step[1]:
            logits = logits - 1e4 * torch.nn.functional.one_hot(torch.tensor(2), 4)
        return logits

    def training_step(decoder, batch, batch_idx):
        step[:] = [decoder.global_step, decoder.model.routers[1]]
        output = begin(decoder, batch, batch_idx)
        shares[decoder.global_step] = output["counts"][1, 2].item()
        return output

    with ledger.attempt("expert starved on purpose"):
        monkeypatch.setattr(Router, "logits", starve)
        monkeypatch.setattr(Decoder, "training_step", training_step)
        status, _, lines = verb("train", "tiny.yaml", "--name", "x")
        told = [line for line in warnings_of(lines) if "got no token" in line]
        assert status == 0
        assert told == ["WARNING: step 12: layer 1: expert 2 got no token for 2 steps"]
        assert all(shares[n] == 0 for n in range(10, 24))
        assert sum(shares[n] for n in range(24, 36)) > 0
