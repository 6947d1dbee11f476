"""Any layout of processes takes a recipe to the weights that one process takes it to."""

from __future__ import annotations

import csv
import math
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
    path = folder / "checkpoints" / cases.folder_of(name) / file
    return torch.load(path, weights_only=True)


def distance(one, other, path: str = "") -> float:
    """The largest difference between numbers of two nested states of the same shape."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return max([0.0, *(distance(one[k], other[k], f"{path}.{k}") for k in one)])
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape, path
        apart = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        assert math.isfinite(apart), path  # max() would lose it
        return apart
    return 0.0


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    path = folder / "checkpoints" / cases.folder_of(name) / "metrics.csv"
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


LAYOUTS = {2: ("ddp", "fsdp", "ep"), 4: ("ddp", "fsdp", "ep", "ep of 2")}
CASES = {2: ("muon", "adamw"), 4: ("muon", "adamw", "idle muon")}
WHOLE = {2: (), 4: ("ddp", "fsdp")}  # of the dense decoder, which has no experts to share
SINGLE = {2: ("fp32",), 4: ("fp32", "bf16")}  # the kinds of run that are not in float64
# Case, who writes it half done, who goes on; "one" is one process.
RESUMED = {
    2: [
        ("muon", "fsdp", "ep"),
        ("muon", "ep", "one"),
        ("adamw", "fsdp", "ep"),
        ("adamw", "ep", "fsdp"),
        ("adamw", "one", "fsdp"),
    ],
    4: [
        ("muon", "fsdp", "ep"),
        ("muon", "ep", "ddp"),
        ("muon", "ddp", "fsdp"),
        ("muon", "ep of 2", "one"),
        ("adamw", "fsdp", "ep of 2"),
        ("adamw", "ep of 2", "fsdp"),
        ("adamw", "one", "ep"),
        ("adamw", "ep", "one"),
    ],
}
FEWER = ("ddp", "ep")  # what 4 processes write half done, and what 2 go on with


def jobs_of(n: int) -> list[str]:
    found = [f"exact:{case}:{layout}" for case in CASES[n] for layout in LAYOUTS[n]]
    found += [f"exact:dense:{layout}" for layout in WHOLE[n]]
    found += [f"{kind}:muon:{layout}" for layout in LAYOUTS[n] for kind in SINGLE[n]]
    found += [f"half:{case}:{first}" for case, first, _ in RESUMED[n] if first != "one"]
    found += [f"{kind}:noise:{layout}" for layout in LAYOUTS[n] for kind in ("exact", "half")]
    resumed = [(half(case, first), case, then) for case, first, then in RESUMED[n] if then != "one"]
    resumed += [(half("noise", layout), "noise", layout) for layout in LAYOUTS[n]]
    broken = [f"broken:adamw:{layout}" for layout in LAYOUTS[n] if layout != "ep of 2"]
    fewer = [f"half:adamw:{FEWER[0]}"] if n == 4 else []
    return [*found, *map(":".join, resumed), *broken, *fewer]


def half(case: str, layout: str) -> str:
    return cases.folder_of(f"half:{case}:{layout}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the runs of one process."""
    path = tmp_path_factory.mktemp("layouts")
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(path)
    torch.set_num_threads(1)
    cases.write_text(path / "text.txt")
    try:
        for case in (*CASES[4], "dense"):
            with cases.in_float64():
                cases.train(cases.recipe(case), cases.folder_of(f"exact:{case}:one"))
        cases.train_half(cases.recipe("adamw"), "half-adamw-one")
        with cases.first_gradients() as gradients:
            run = cases.train(cases.recipe("muon", backend="auto"), "fp32-muon-one")
        torch.save(gradients, run.path / "gradients.pt")
        cases.train(cases.recipe("muon", backend="auto", precision="bf16"), "bf16-muon-one")
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
    if request.param == 4:
        spawn(2, [f"{half('adamw', FEWER[0])}:adamw:{FEWER[1]}"], path)
    with pytest.MonkeyPatch.context() as patch, cases.in_float64():
        patch.chdir(path)
        for case, first, then in RESUMED[request.param]:
            if then == "one":
                cases.resume(half(case, first), cases.overrides({}))
    return path, request.param


def test_in_float64_weights_and_optimizer_state_are_those_of_one_process(trained):
    path, n = trained
    for case in (*CASES[n], "dense"):
        one = checkpoint(path, f"exact:{case}:one")
        for layout in WHOLE[n] if case == "dense" else LAYOUTS[n]:
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


def optimizer_state(checkpoint: dict) -> dict:
    (optimizer,) = checkpoint["optimizer_states"]
    return optimizer["state"]


def test_what_one_layout_wrote_another_goes_on_with(trained):
    """Weights, selection biases and moments end as if it had never stopped."""
    path, n = trained
    for case, first, then in RESUMED[n]:
        one, other = checkpoint(path, f"exact:{case}:one"), checkpoint(path, f"half:{case}:{first}")
        assert other["global_step"] == cases.STEPS
        layout = other["nano_moe"]["recipe"]["trainer"]
        assert layout["strategy"] == {"one": "auto", "ep of 2": "ep"}.get(then, then)
        assert layout["devices"] == (1 if then == "one" else n)
        assert distance(one["state_dict"], other["state_dict"]) <= 1e-9, (case, first, then)
        states = map(optimizer_state, (one, other))
        assert distance(*states) <= 1e-9, (case, first, then)


@pytest.mark.parametrize("trained", [pytest.param(4, marks=pytest.mark.slow)], indirect=True)
def test_fewer_processes_go_on_with_what_more_wrote(trained):
    path, _ = trained
    one, other = (checkpoint(path, f"{kind}:adamw:{FEWER[0]}") for kind in ("exact", "half"))
    layout = other["nano_moe"]["recipe"]["trainer"]
    assert (other["global_step"], layout["devices"], layout["strategy"]) == (20, 2, FEWER[1])
    assert distance(one["state_dict"], other["state_dict"]) <= 1e-9
    assert distance(*map(optimizer_state, (one, other))) <= 1e-9


def test_noise_of_every_process_goes_on_where_it_stopped(trained):
    """Bit for bit, in the same layout."""
    path, n = trained
    for layout in LAYOUTS[n]:
        whole, other = (checkpoint(path, f"{kind}:noise:{layout}") for kind in ("exact", "half"))
        assert other["global_step"] == cases.STEPS
        assert distance(whole["state_dict"], other["state_dict"]) == 0, layout
        assert distance(*map(optimizer_state, (whole, other))) == 0, layout
        states = [[c["nano_moe"]["rng"], *c["nano_moe"]["rng_of_others"]] for c in (whole, other)]
        draws = [[hash(state["cpu"].numpy().tobytes()) for state in of] for of in states]
        assert draws[0] == draws[1] and len(set(draws[0])) == n, layout


def losses(folder: Path, job: str) -> list[float]:
    """Of the training, step by step."""
    return [float(row["train/ce"]) for row in rows(folder, job) if row["train/ce"]]


@pytest.mark.parametrize("trained", [pytest.param(4, marks=pytest.mark.slow)], indirect=True)
def test_in_bf16_losses_begin_as_those_of_one_process(trained):
    """As near as rounding lets them: products of other shapes add up in another order, and where
    that tips a logit over to its neighbour in bf16 it moves by 2^-8 of its size, here about 1.

    The first loss has equal weights and is a mean over 64 tokens: 2^-8 / sqrt(64). The next four
    come from updates that were rounded likewise, and may be 2^-8 of themselves away.
    """
    path, n = trained
    one = losses(path, "bf16:muon:one")
    for layout in LAYOUTS[n]:
        other = losses(path, f"bf16:muon:{layout}")
        assert len(other) == len(one) == cases.STEPS
        assert other[0] != losses(path, f"fp32:muon:{layout}")[0], layout
        assert other[0] == pytest.approx(one[0], abs=2**-8 / math.sqrt(64)), layout
        assert other[1:5] == pytest.approx(one[1:5], rel=2**-8), layout


def test_gradients_that_one_process_breaks_stop_all_and_one_says_so(trained):
    """That each process raised what it must is asserted where they ran."""
    path, _ = trained
    for layout in ("ddp", "fsdp", "ep"):
        left = path / "checkpoints" / f"broken-adamw-{layout}"
        assert "gradient norm nan" in (left / "nonfinite.json").read_text(), layout
        assert checkpoint(path, left.name)["global_step"] == 0, layout


def test_one_process_reads_and_scores_what_any_layout_wrote(trained, monkeypatch):
    path, n = trained
    monkeypatch.chdir(path)
    for layout in LAYOUTS[n]:
        name = cases.folder_of(f"fp32:muon:{layout}")
        recipe, model, _ = checkpoints.load_model(runs.find(name))
        scored = evaluate(model, cases.corpus(recipe), batch_size=4, precision="fp32")
        told = [float(row["val/ce"]) for row in rows(path, name) if row["val/ce"]]
        assert scored.overall.ce == pytest.approx(min(told), abs=1e-6)


@pytest.mark.slow
def test_compiled_ddp_takes_the_losses_of_one_process(folder):
    spawn(2, ["compiled:muon:ddp"], folder)
    one, other = (losses(folder, job) for job in ("fp32:muon:one", "compiled:muon:ddp"))
    assert one == pytest.approx(other, abs=1e-4)
