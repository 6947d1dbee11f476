"""Whichever layout trained a run, other verbs take it as one of one process; by command line."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nano_moe.cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
import cases

pytestmark = pytest.mark.slow
LAYOUTS = ("ddp", "fsdp", "ep")
# Different orders of summation, after 12 steps in float32. Where a choice of experts, which is all
# or nothing, is compared it is by shares, of which 1 % may go elsewhere.
CLOSE = 1e-4
RECIPE = """\
seed: 5
model:
  {vocab_size: 264, context: 16, n_layers: 2, d_model: 32, n_heads: 2, d_ff: 64, init_std: 0.2,
   moe: {n_experts: 4, top_k: 2, load_balancing_loss: 0.01}}
data: {files: [text.txt], tokenizer: byte, val_fraction: 0.2, cache: cache}
optim: {lr: 0.01, newton_schulz: fp32}
trainer:
  {steps: 12, batch_size: 4, precision: fp32, accelerator: cpu, val_every: 6, log_every: 2}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nano_moe", *arguments]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the run `one` of one process, and one of two for each layout."""
    folder = tmp_path_factory.mktemp("verbs")
    cases.write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(RECIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("one", *LAYOUTS):
        fields = {} if name == "one" else {"devices": 2, "strategy": name}
        arguments = ("train", "tiny.yaml", "--name", name, *cases.overrides(fields))
        trained = subprocess.run(
            command(*arguments), cwd=folder, env=environment, capture_output=True, text=True
        )
        assert trained.returncode == 0, trained.stderr
    return folder


@pytest.fixture
def told(place, monkeypatch, capsys) -> Iterator[Callable[..., str]]:
    """told(verb, …) -> what it prints, in the folder of all runs."""
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        status = main(arguments)
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_scores_them_alike(told, layout):
    one, other = (json.loads(told("eval", name, "--json")) for name in ("one", layout))
    assert other["tokens"] == one["tokens"] and other["domains"].keys() == one["domains"].keys()
    for figure in ("ce", "bpb"):
        assert other[figure] == pytest.approx(one[figure], abs=CLOSE)
    for a, b in zip(one["routing"], other["routing"], strict=True):
        assert b["load"] == pytest.approx(a["load"], abs=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_writes_the_same_weights(told, layout, tmp_path):
    """Each folder was loaded by Hugging Face's classes, whose logits it compared."""
    found = {}
    for name in ("one", layout):
        written = json.loads(told("export", name, "--to", "hf", str(tmp_path / name), "--json"))
        assert written["difference"] <= CLOSE and written["step"] == 12
        (file,) = (tmp_path / name).glob("*.safetensors")
        found[name] = load_file(file)
    one, other = found["one"], found[layout]
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=CLOSE, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_writes_the_same_text(told, layout):
    question = ("--prompt", "the old", "--tokens", "80", "--temperature", "0")
    one, other = (told("sample", name, *question) for name in ("one", layout))
    assert one == other and len(one) >= 80


def check_alike(get: Callable[[str], Any], run: int) -> None:
    """All documents of a run against those of the first; get(key) -> a document."""
    one, other = (get(f"runs/{number}/compute") for number in (0, run))
    assert other["run"]["name"] != one["run"]["name"] == "one"
    assert {**other, "run": {**other["run"], "name": "one"}} == one
    one, other = (get(f"runs/{number}/balance") for number in (0, run))
    assert one["steps"] == other["steps"]
    for a, b in zip(one["layers"], other["layers"], strict=True):
        assert torch.tensor(b["load"]) == pytest.approx(torch.tensor(a["load"]), abs=0.01)
    one, other = (get(f"runs/{number}/passages/0/0") for number in (0, run))
    check_trace(one, other)
    one, other = (get(f"runs/{number}/specialization") for number in (0, run))
    assert (one["tokens"], one["of"]) == (other["tokens"], other["of"])
    for a, b in zip(one["layers"], other["layers"], strict=True):
        shares = [[expert["share"] for expert in layer["experts"]] for layer in (a, b)]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)


def check_trace(one: dict, other: dict) -> None:
    assert one["tokens"] == other["tokens"] and len(one["tokens"]) > 10
    means = [statistics.fmean(trace["nats"]) for trace in (one, other)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)


def check_cards(cards: list[dict]) -> None:
    assert [card.pop("name") for card in cards] == ["one", *LAYOUTS]
    losses = [card.pop("ce") for card in cards]
    assert losses == pytest.approx([losses[0]] * 4, abs=CLOSE)
    assert all(card == cards[0] for card in cards) and cards[0]["step"] == 12


def documents_of(page: str) -> dict:
    return json.loads(re.search(r'id="documents">(.*?)</script', page, re.DOTALL)[1])


def test_a_page_shows_them_alike(told, tmp_path):
    told("report-html", "one", *LAYOUTS, "--out", str(tmp_path / "page.html"))
    documents = documents_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    check_cards(documents["overview"]["runs"])
    for run in range(1, 4):
        check_alike(documents.__getitem__, run)
        texts = [
            "".join(step["token"] for step in documents[f"runs/{n}/generation"]["steps"])
            for n in (0, run)
        ]
        assert texts[0] == texts[1] != ""


@contextlib.contextmanager
def explored(folder: Path, *names: str) -> Iterator[int]:
    """The port at which `explore` serves these runs."""
    server = subprocess.Popen(
        command("explore", *names, "--no-browser"),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield int(re.search(r"http://127\.0\.0\.1:(\d+)/", server.stdout.readline())[1])
    finally:
        server.terminate()
        server.communicate(timeout=60)


def answer(port: int, path: str, question: dict | None = None) -> str:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as sent:
        body = None if question is None else json.dumps(question)
        method = "GET" if question is None else "POST"
        sent.request(method, path, body, {"Content-Type": "application/json"})
        found = sent.getresponse()
        text = found.read().decode()
        assert found.status == 200, text
    return text


def test_a_live_server_shows_them_alike(place):
    with explored(place, "one", *LAYOUTS) as port:
        overview = documents_of(answer(port, "/"))["overview"]
        assert overview["live"]
        check_cards(overview["runs"])
        for run in range(1, 4):
            check_alike(lambda key: json.loads(answer(port, f"/api/{key}")), run)
            text = {"text": "the hen ran to the old river"}
            both = [json.loads(answer(port, f"/api/runs/{n}/route", text)) for n in (0, run)]
            check_trace(*both)
            question = {"prompt": "fox", "tokens": 20, "temperature": 0, "top_p": 1, "seed": 0}
            lines = [answer(port, f"/api/runs/{n}/generate", question) for n in (0, run)]
            steps = [[json.loads(line) for line in told.splitlines()][1:] for told in lines]
            drawn = [[step["token"] for step in of] for of in steps]
            assert drawn[0] == drawn[1] and len(drawn[0]) == 20
