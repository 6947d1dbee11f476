"""Signals from outside: the status a shell expects, the command to go on, and a run that does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nano_moe.training.module import Decoder

ENDLESS = ("trainer.steps=1000000", "trainer.val_every=1000000", "trainer.save_every=1000000")


def stop_after_some_steps(arguments: list[str], number: int) -> tuple[int, str]:
    """(exit status, stderr) of a real process, signalled once it has written a row of metrics."""
    metrics = Path("checkpoints/x/metrics.csv")
    before = metrics.stat().st_size if metrics.exists() else 60  # more than the header
    process = subprocess.Popen(
        [sys.executable, "-m", "nano_moe", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_size > before + 60:
            process.send_signal(number)
            break
        time.sleep(0.02)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def test_a_process_stopped_by_signals_says_how_to_go_on_and_does(shop):
    last = Path("checkpoints/x/last.ckpt")
    steps = []
    starts = [["train", "tiny.yaml", "--name", "x", *ENDLESS], ["resume", "x"]]
    for arguments, number in zip(starts, (signal.SIGTERM, signal.SIGINT), strict=True):
        status, err = stop_after_some_steps(arguments, number)
        assert status == 128 + number
        assert "Traceback" not in err
        step = torch.load(last, weights_only=True)["global_step"]
        steps.append(step)
        stopped = f"stopped at step {step} of 1000000 by {signal.Signals(number).name}"
        assert f"{stopped}; go on with: make resume RUN=x" in err.splitlines()
    assert 0 < steps[0] < steps[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_train_ends_with_the_status_of_its_signal(shop, monkeypatch, number, status):
    _signal_in_step(monkeypatch, 5, [number])
    found, _, err = shop.run("train", "tiny.yaml", "--name", "x")
    assert found == status
    assert err.rstrip().endswith("go on with: make resume RUN=x")
    assert "error:" not in err
    assert shop.json("resume", "x")["ce"] == shop.json("eval", "done")["ce"]


def test_a_second_ctrl_c_ends_it_at_once_with_130(shop, monkeypatch):
    _signal_in_step(monkeypatch, 5, [signal.SIGINT, signal.SIGINT])
    status, _, err = shop.run("train", "tiny.yaml", "--name", "x")
    assert status == 130 and "Traceback" not in err
    content = torch.load("checkpoints/x/last.ckpt", weights_only=True)
    assert content["global_step"] == 4  # the last multiple of save_every, not the 5th step
    assert shop.json("resume", "x")["step"] == 6


def _signalled(number: int):
    """A stand-in for any function, in which the signal comes."""

    def stopped(*arguments):
        os.kill(os.getpid(), number)
        time.sleep(60)  # another thread may have taken it: it arrives here a moment later

    return stopped


OUTSIDE = {
    "count": ("nano_moe.accounting.count", ("tiny.yaml",)),
    "export": ("nano_moe.export.gguf_file.rounded", ("done", "--to", "gguf", "out.gguf")),
}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("verb", OUTSIDE)
def test_a_signal_outside_training_leaves_nothing_half_written(
    shop, monkeypatch, verb, number, status
):
    function, arguments = OUTSIDE[verb]
    monkeypatch.setattr(function, _signalled(number))
    before = shop.files()
    earlier = signal.signal(  # background shells ignore it
        signal.SIGINT, signal.default_int_handler
    )
    try:
        found, _, err = shop.run(verb, *arguments)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert found == status and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert shop.files() == before


def _signal_in_step(monkeypatch, step: int, numbers: list[int]) -> None:
    original = Decoder.training_step

    def training_step(module, batch, batch_idx):
        if module.global_step == step - 1:
            for _ in range(len(numbers)):
                os.kill(os.getpid(), numbers.pop(0))
        return original(module, batch, batch_idx)

    monkeypatch.setattr(Decoder, "training_step", training_step)
