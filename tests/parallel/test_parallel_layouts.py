"""Any layout of processes takes a recipe to the weights that one process takes it to."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nano_moe import checkpoints, runs
from nano_moe.evaluation import evaluate

sys.path.insert(0, str(Path(__file__).parent))
import cases

WORKER = Path(__file__).parent / "worker.py"


def spawn(n: int, jobs: list[str], folder: Path) -> None:
    """Run `jobs` in `n` processes of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    numbers = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n)} for r in range(n)]
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *jobs],
            cwd=folder,
            env={**os.environ, **variables, **own},
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in numbers
    ]
    try:
        told = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    faults = [text for text, process in zip(told, started, strict=True) if process.returncode]
    if faults:
        pytest.fail("\n".join(faults)[-4000:], pytrace=False)


def checkpoint(folder: Path, name: str, file: str = "last.ckpt") -> dict:
    name = name.replace(":", "-").replace(" ", "_")
    return torch.load(folder / "checkpoints" / name / file, weights_only=True)


def distance(one, other, path: str = "") -> float:
    """The largest difference between numbers of two nested states of the same shape."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return max([0.0, *(distance(one[k], other[k], f"{path}.{k}") for k in one)])
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape, path
        return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
    return 0.0


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    name = name.replace(":", "-").replace(" ", "_")
    with open(folder / "checkpoints" / name / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


LAYOUTS = {2: ("ddp", "fsdp", "ep"), 4: ("ddp", "fsdp", "ep", "ep of 2")}
CASES = {2: ("muon", "adamw"), 4: ("muon", "adamw", "idle muon")}
RESUMED = {2: [("fsdp", "ep")], 4: [("fsdp", "ep"), ("ep", "ddp"), ("ddp", "fsdp")]}


def jobs_of(n: int) -> list[str]:
    found = [f"exact:{case}:{layout}" for case in CASES[n] for layout in LAYOUTS[n]]
    found += [f"fp32:muon:{layout}" for layout in LAYOUTS[n]]
    found += [f"half:muon:{first}" for first, _ in RESUMED[n]]
    found += [f"half-muon-{first}:muon:{then}" for first, then in RESUMED[n]]
    return [*found, "broken:adamw:ep"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the runs of one process."""
    path = tmp_path_factory.mktemp("layouts")
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(path)
    torch.set_num_threads(1)
    cases.write_text(path / "text.txt")
    try:
        for case in CASES[4]:
            with cases.in_float64():
                cases.train(cases.recipe(case), f"exact-{case}-one".replace(" ", "_"))
        with cases.first_gradients() as gradients:
            run = cases.train(cases.recipe("muon", backend="auto"), "fp32-muon-one")
        torch.save(gradients, run.path / "gradients.pt")
        yield path
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def trained(request, folder, tmp_path_factory):
    """(folder, n) with the runs of `n` processes beside those of one."""
    path = tmp_path_factory.mktemp(f"on{request.param}") / "work"
    path.mkdir()
    for name in ("text.txt", "cache", "checkpoints"):
        subprocess.run(["cp", "-r", str(folder / name), str(path / name)], check=True)
    spawn(request.param, jobs_of(request.param), path)
    return path, request.param


def test_in_float64_weights_and_optimizer_state_are_those_of_one_process(trained):
    path, n = trained
    for case in CASES[n]:
        one = checkpoint(path, f"exact:{case}:one")
        for layout in LAYOUTS[n]:
            other = checkpoint(path, f"exact:{case}:{layout}")
            assert other["global_step"] == cases.STEPS
            assert distance(one["state_dict"], other["state_dict"]) <= 1e-9, (case, layout)
            states = [c["optimizer_states"][0]["state"] for c in (one, other)]
            assert distance(*states) <= 1e-9, (case, layout)
            losses = [rows(path, f"exact:{case}:{name}") for name in ("one", layout)]
            for a, b in zip(*losses, strict=True):
                for column in set(a) - {"seconds"}:
                    assert (a[column] == "") == (b[column] == ""), (column, a, b)
                    if a[column]:
                        assert float(a[column]) == pytest.approx(float(b[column]), abs=1e-9)


def test_a_checkpoint_holds_the_tied_embedding_once(trained):
    path, n = trained
    for layout in ("one", *LAYOUTS[n]):
        state = checkpoint(path, f"exact:muon:{layout}")["state_dict"]
        embedding, head = state["model.embedding.weight"], state["model.head.weight"]
        assert embedding.data_ptr() == head.data_ptr(), layout


def test_experts_are_idle_where_the_cases_say_so(trained):
    """Else nothing is shown of them: some expert took part in fewer steps than there were."""
    path, _ = trained
    state = checkpoint(path, "exact:adamw:one")["optimizer_states"][0]["state"]
    steps = [s["step"].flatten() for s in state.values() if s["step"].numel() == 16]
    assert steps and all(step.min() < cases.STEPS for step in steps)


def test_in_float32_first_gradients_and_losses_agree(trained):
    path, n = trained
    one = checkpoint(path, "fp32:muon:one", "gradients.pt")
    size = sum(grad.square().sum() for grad in one.values()).sqrt()
    for layout in LAYOUTS[n]:
        other = checkpoint(path, f"fp32:muon:{layout}", "gradients.pt")
        apart = sum((one[name] - other[name]).square().sum() for name in one).sqrt()
        assert apart <= 1e-5 * size, layout
        pairs = zip(rows(path, "fp32:muon:one"), rows(path, f"fp32:muon:{layout}"), strict=True)
        for a, b in pairs:
            for column in ("train/ce", "val/ce"):
                if a[column]:
                    assert abs(float(a[column]) - float(b[column])) <= 1e-4, (layout, a["step"])


def test_what_one_layout_wrote_another_goes_on_with(trained):
    path, n = trained
    one = checkpoint(path, "exact:muon:one")
    for half, _ in RESUMED[n]:
        other = checkpoint(path, f"half:muon:{half}")
        assert other["global_step"] == cases.STEPS
        assert distance(one["state_dict"], other["state_dict"]) <= 1e-9, half


def test_gradients_that_one_process_breaks_stop_all_and_one_says_so(trained):
    """That each process raised what it must is asserted where they ran."""
    path, _ = trained
    left = path / "checkpoints" / "broken-adamw-ep"
    assert "gradient norm nan" in (left / "nonfinite.json").read_text()
    assert checkpoint(path, left.name)["global_step"] == 0


def test_one_process_reads_and_scores_what_any_layout_wrote(trained, monkeypatch):
    path, n = trained
    monkeypatch.chdir(path)
    for layout in LAYOUTS[n]:
        name = f"fp32-muon-{layout}".replace(" ", "_")
        recipe, model, _ = checkpoints.load_model(runs.find(name))
        scored = evaluate(model, cases.corpus(recipe), batch_size=4, precision="fp32")
        told = [float(row["val/ce"]) for row in rows(path, name) if row["val/ce"]]
        assert scored.overall.ce == pytest.approx(min(told), abs=1e-6)
