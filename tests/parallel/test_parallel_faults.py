"""Real processes of one training: killed, stopped, started otherwise; the rest ends, and says why.

Every wait here is shorter than the silence after which processes give each other up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nano_moe import checkpoints, launch, recipe_file, runs
from nano_moe.config import Recipe
from nano_moe.device import choose_devices, count_processes
from nano_moe.errors import UserError
from nano_moe.recipe_file import dump
from nano_moe.training import processes
from nano_moe.training.fit import fit

sys.path.insert(0, str(Path(__file__).parent))
import cases

ENDLESS = {"steps": 10**6, "val_every": 10**6, "save_every": 5, "batch_size": 4}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text and `tiny.yaml`, which never ends."""
    monkeypatch.chdir(tmp_path)
    cases.write_text(tmp_path / "text.txt")
    recipe = cases.recipe("adamw", backend="auto", **ENDLESS)
    (tmp_path / "tiny.yaml").write_text(dump(recipe))
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nano_moe", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def others(leader: subprocess.Popen[str]) -> list[int]:
    """The processes that the first one started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            ours = b"nano_moe" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == leader.pid and ours:
            found.append(int(folder.name))
    return found


def rank_of(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(dict(one.split(b"=", 1) for one in variables if one)[b"RANK"])


def wait_for_rows(leader: subprocess.Popen[str], name: str, n: int) -> None:
    """Until `n` more rows of metrics are written."""
    metrics = Path(f"checkpoints/{name}/metrics.csv")
    before = len(metrics.read_bytes().splitlines()) if metrics.exists() else 1
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and leader.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= before + n:
            return
        time.sleep(0.1)
    leader.kill()
    raise AssertionError(leader.communicate()[1])


def is_gone(process: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def fault_of(leader: subprocess.Popen[str], seconds: float = 60) -> str:
    """The one line by which a training that ends within so long says why."""
    try:
        told = leader.communicate(timeout=seconds)[1]
    finally:
        leader.kill()
    assert leader.returncode == 2 and "Traceback" not in told, told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    return line


@contextlib.contextmanager
def stopped(process: int) -> Iterator[None]:
    """It lies still, and is gone at the end whatever others made of that."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def step_of(name: str) -> int:
    return int(checkpoints.read_checkpoint(Path(f"checkpoints/{name}/last.ckpt"))["global_step"])


LAYOUTS = {
    "ddp on 2": {"devices": 2, "strategy": "ddp"},
    "ddp on 3": {"devices": 3, "strategy": "ddp", "batch_size": 3},
    "fsdp on 2": {"devices": 2, "strategy": "fsdp"},
    "ep on 2": {"devices": 2, "strategy": "ep"},
    "ep of 2 on 4": {"devices": 4, "strategy": "ep", "expert_ranks": 2},
}


def several(layout: str) -> list[str]:
    """A training in that layout; its last process is the one that comes to harm."""
    return ["train", "tiny.yaml", "--name", "x", *cases.overrides(LAYOUTS[layout])]


SHARDED = ("fsdp on 2", "ep on 2", "ep of 2 on 4")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SHARDED]


@pytest.mark.parametrize("layout", ["ddp on 2", *SLOW])
def test_a_process_that_dies_ends_the_training_which_goes_on_in_another_layout(place, layout):
    leader, n = start(*several(layout)), LAYOUTS[layout]["devices"]
    wait_for_rows(leader, "x", 6)
    number = {rank_of(other): other for other in others(leader)}
    assert number.keys() == set(range(1, n))
    os.kill(number[n - 1], signal.SIGKILL)
    line = fault_of(leader)
    told = f"process {n - 1} of {n} was ended by SIGKILL; checkpoints/x/last.ckpt is whole"
    assert line.startswith(f"error: {told}") and "make resume RUN=x" in line
    assert all(map(is_gone, number.values()))
    at = step_of("x")
    assert at >= 5 and at % 5 == 0

    leader = start("resume", "x", *cases.overrides({}))
    wait_for_rows(leader, "x", 2)
    leader.send_signal(signal.SIGTERM)
    told = leader.communicate(timeout=60)[1]
    assert leader.returncode == 143 and step_of("x") > at
    (line,) = [line for line in told.splitlines() if "go on with: " in line]
    assert "make resume RUN=x trainer.strategy=auto trainer.devices=1" in line


@pytest.mark.slow
def test_a_leader_that_dies_ends_the_others(place):
    leader = start(*several("ddp on 3"))
    wait_for_rows(leader, "x", 6)
    left = others(leader)
    assert len(left) == 2
    leader.kill()
    assert all(is_gone(process) for process in left)
    told = leader.communicate(timeout=60)[1]
    faults = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(faults) == 1 and "process 0" in faults[0] and "resume RUN=x" in faults[0]
    assert step_of("x") >= 5


IMPATIENT = """
from datetime import timedelta

from torch.distributed import distributed_c10d

from nano_moe import ranks
from nano_moe.training import processes

connect = processes._connect


def connect_in_peace(*arguments):  # on a busy machine imports alone take half a minute
    connect(*arguments)
    processes.SILENCE = timedelta(minutes=0.5)
    sooner = timedelta(seconds=ranks.rank())  # the one that speaks is always told by another
    distributed_c10d._set_pg_timeout(processes.SILENCE - sooner)


processes._connect = connect_in_peace
"""


@pytest.fixture
def impatient(place, monkeypatch):
    """Every process imports this first."""
    (place / "sitecustomize.py").write_text(IMPATIENT)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp on 3", "ep of 2 on 4"])
def test_a_process_that_hangs_is_named(place, impatient, layout):
    """After the silence and a roll call; what was saved is whole."""
    leader, n = start(*several(layout)), LAYOUTS[layout]["devices"]
    wait_for_rows(leader, "x", 6)
    number = {rank_of(other): other for other in others(leader)}
    with stopped(number[n - 1]):
        line = fault_of(leader, seconds=30 + 2 * processes.ROLL + 30)
    assert line.startswith(f"error: process {n - 1} of {n} has been silent for 0.5 minutes"), line
    assert "make resume RUN=x" in line and all(map(is_gone, number.values()))
    _, _, step = checkpoints.load_model(runs.find("x"))
    assert step == step_of("x") >= 5


@pytest.mark.slow
def test_a_first_process_that_hangs_is_named_by_one_of_the_others(place, impatient):
    leader = start(*several("ddp on 3"))
    wait_for_rows(leader, "x", 6)
    left = others(leader)
    os.kill(leader.pid, signal.SIGSTOP)
    assert len(left) == 2 and all(is_gone(process, seconds=180) for process in left)
    leader.kill()
    told = [line for line in leader.communicate()[1].splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "process 0 of 3 has been silent for 0.5 minutes" in told[0], told


@pytest.mark.parametrize(("rank", "told"), [(0, "1 of 2 processes"), (1, "no process 0 at 127")])
def test_processes_that_never_get_in_touch_are_counted(monkeypatch, rank, told):
    """Nothing is said of a run, as there is none."""
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for name, value in (launch._variables(2) | numbers).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "SILENCE", timedelta(seconds=1.2))
    monkeypatch.setattr(processes, "NOTICE", 0.0)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # these tests can be ended
    with pytest.raises(UserError) as found, processes.started(cases.recipe("adamw", devices=2), []):
        pass
    assert f"trainer.devices: {told}" in str(found.value)
    assert "within 0.02 minutes" in str(found.value) and "srun or torchrun" in str(found.value)
    assert "resume" not in str(found.value)


def test_no_run_is_advised_before_there_is_one():
    assert "resume" not in launch.Watch().advice


def under_srun(monkeypatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    numbers = {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NTASKS": "4", "STEP_ID": "0"}
    for name, value in (numbers | variables).items():
        monkeypatch.setenv(f"SLURM_{name}", value)


SLURM = {
    "4 processes were started, and trainer.devices times trainer.nodes is 1": (1, {}),
    "4 processes were started, and trainer.devices times trainer.nodes is 2": (2, {}),
    "SLURM_NTASKS_PER_NODE is not set": (4, {}),
    "srun --nodes=1 --ntasks-per-node=4": (4, {"NTASKS_PER_NODE": "2", "NNODES": "2"}),
}


@pytest.mark.parametrize("text", SLURM)
def test_tasks_of_srun_that_are_not_what_the_recipe_says_are_refused(monkeypatch, text):
    devices, variables = SLURM[text]
    under_srun(monkeypatch, **variables)
    recipe = cases.recipe("adamw", devices=devices)
    with pytest.raises(UserError) as found, processes.started(recipe, []):
        pass
    assert text in str(found.value)


def test_the_body_of_a_batch_script_is_one_process(monkeypatch):
    under_srun(monkeypatch)
    monkeypatch.delenv("SLURM_STEP_ID")
    launch.check_count(cases.recipe("adamw"))
    with pytest.raises(UserError, match="need torchrun or srun"):
        launch.check_count(cases.recipe("adamw", devices=2, nodes=2))


def test_the_first_process_takes_no_more_cores_than_those_it_starts(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    before = torch.get_num_threads()
    with processes._share_of_cores(launch.Watch(others=[None, None])):
        assert torch.get_num_threads() == 3
    with processes._share_of_cores(launch.Watch()):
        assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("who", ["leader", "other"])
def test_a_signal_to_any_process_stops_all_after_the_same_step(place, who):
    leader = start(*several("ep on 2"))
    wait_for_rows(leader, "x", 3)
    (other,) = others(leader)
    os.kill(leader.pid if who == "leader" else other, signal.SIGTERM)
    told = leader.communicate(timeout=60)[1]
    assert leader.returncode == 143, told
    assert f"stopped at step {step_of('x')} of 1000000 by SIGTERM" in told
    assert is_gone(other, 1)


@pytest.mark.slow
def test_a_second_signal_ends_a_training_of_which_a_process_hangs(place):
    """No handler of Python's runs in the first one, which waits within gloo."""
    leader = start(*several("ddp on 2"))
    wait_for_rows(leader, "x", 6)
    (other,) = others(leader)
    with stopped(other):
        time.sleep(1)  # until the first process waits
        leader.send_signal(signal.SIGINT)
        time.sleep(launch.GRACE + 2)
        assert leader.poll() is None
        leader.send_signal(signal.SIGINT)
        told = leader.communicate(timeout=launch.GRACE + 10)[1]
    assert leader.returncode == 130 and "Traceback" not in told
    lines = [line for line in told.splitlines() if "make resume RUN=x" in line]
    assert ["SIGINT: the step" in lines[0], lines[1].startswith("interrupted; ")] == [True] * 2
    assert step_of("x") >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 6), (signal.SIGTERM, 3)])
def test_a_signal_to_all_while_they_get_ready_is_no_fault(place, number, seconds):
    leader = subprocess.Popen(
        [sys.executable, "-m", "nano_moe", *several("fsdp on 2")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may ignore it
    )
    time.sleep(seconds)
    os.killpg(leader.pid, number)
    try:
        told = leader.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
    assert leader.returncode in (130, 143), told
    assert "error: " not in told and "Traceback" not in told, told


def torchrun(*arguments: str) -> list[str]:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*started, "--nproc-per-node=2", "-m", "nano_moe", *arguments]


@pytest.mark.slow
def test_a_process_of_torchruns_that_dies_is_named_before_torchrun_ends_the_other(place):
    command = torchrun(*several("ddp on 2"))
    leader = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for_rows(leader, "x", 6)
    number = {rank_of(one): one for one in others(leader)}
    os.kill(number[1], signal.SIGKILL)
    told = leader.communicate(timeout=60)[1]
    assert leader.returncode
    faults = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(faults) == 1 and "process 1 of 2 cannot be reached" in faults[0], told
    assert "last.ckpt is whole, go on with: make resume RUN=x" in faults[0]
    assert step_of("x") >= 5


@pytest.mark.slow
def test_torchrun_starts_the_processes_too(place):
    """Which must be as many as the recipe says; the run folder is claimed once."""
    command = torchrun("train", "tiny.yaml", "trainer.steps=3")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    wrong = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert wrong.returncode and "2 processes were started" in wrong.stderr
    command += ["trainer.devices=2", "trainer.strategy=ddp"]
    right = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert right.returncode == 0, right.stderr
    assert [path.name for path in Path("checkpoints").iterdir()] == ["tiny-1"]
    assert step_of("tiny-1") == 3
    assert right.stdout.count("validation loss") == 1


def finish_all(commands: list[list[str]], variables: list[dict[str, str]]) -> list[str]:
    """What each of these processes, all begun at once, said once it was done."""
    begun = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **own},
        )
        for command, own in zip(commands, variables, strict=True)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in begun]
    finally:
        for process in begun:
            process.kill()
    assert [process.returncode for process in begun] == [0] * len(begun), told
    return told


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_of_torchrun_on_one_machine(place):
    """The README's command, with an agent for each of two nodes of one process."""
    port = free_port()
    shared = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    ours = ["-m", "nano_moe", "train", "tiny.yaml", "trainer.nodes=2", "trainer.devices=1"]
    ours += ["trainer.strategy=fsdp", "trainer.steps=3"]
    nodes = [
        [sys.executable, "-m", "torch.distributed.run", f"--node-rank={number}"]
        + [*shared, f"--master-port={port}", *ours]
        for number in range(2)
    ]
    told = finish_all(nodes, [{}, {}])
    assert ["validation loss" in one for one in told] == [True, False]
    assert [path.name for path in Path("checkpoints").iterdir()] == ["tiny-1"]
    assert step_of("tiny-1") == 3


@pytest.mark.slow
def test_tasks_with_sruns_variables_are_one_training(place):
    """As srun is said to set them; there is no SLURM here."""
    shared = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0", "STEP_ID": "0"}
    shared |= {"JOB_ID": str(free_port()), "JOB_NAME": "train", "NODELIST": "localhost"}
    tasks = [{**shared, "PROCID": str(n), "LOCALID": str(n)} for n in range(2)]
    ours = [sys.executable, "-m", "nano_moe", "train", "tiny.yaml"]
    ours += ["trainer.devices=2", "trainer.strategy=ddp", "trainer.steps=3"]
    variables = [{f"SLURM_{name}": value for name, value in task.items()} for task in tasks]
    told = finish_all([ours, ours], variables)
    assert ["validation loss" in one for one in told] == [True, False]
    assert step_of("tiny-1") == 3


FAULTS = {
    "devices: 0": {"devices": 0},
    "trainer.batch_size: 4 sequences do not split over 3": {"devices": 3},
    "4 processes do not form groups of 3": {"devices": 4, "strategy": "ep", "expert_ranks": 3},
    "strategy=fsdp shares no experts": {"strategy": "fsdp", "expert_ranks": 2},
    "compile: strategy=fsdp": {"strategy": "fsdp", "devices": 2, "compile": True},
    "16 experts do not split over 3": {"devices": 3, "strategy": "ep", "batch_size": 3},
}


@pytest.mark.parametrize("text", FAULTS)
def test_layouts_that_cannot_work_are_refused_and_named(place, text):
    overrides = [f"trainer.{field}={value}" for field, value in FAULTS[text].items()]
    with pytest.raises(UserError) as found:
        recipe_file.load("tiny.yaml", [o.replace("True", "true") for o in overrides])
    assert text.replace("devices: 0", "0 processes").split(": ")[-1] in str(found.value)
    assert "trainer." in str(found.value)


def test_a_dense_model_has_no_experts_to_share_and_experts_that_choose_see_no_batch(place):
    for fields in (["trainer.strategy=ep", "model.moe=null", "optim.expert_lr=null"],):
        with pytest.raises(UserError, match="ep shares experts"):
            recipe_file.load("tiny.yaml", fields)
    moe = {"n_experts": 4, "top_k": 2, "routing": "expert_choice"}
    content = cases.recipe("adamw", devices=2).model_dump()
    content["model"]["moe"] = moe
    with pytest.raises(ValueError, match="expert_choice chooses among all tokens"):
        Recipe.model_validate(content)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    gpus = {"accelerator": "gpu", "strategy": "ddp"}
    assert choose_devices(cases.recipe("muon", "auto", **gpus, devices="auto")) == 2
    assert count_processes(cases.recipe("muon", "auto", **gpus, devices=2, nodes=2)) == 4
    with pytest.raises(UserError, match=r"trainer\.devices: 4 GPUs, but this node has 2"):
        choose_devices(cases.recipe("muon", "auto", **gpus, devices=4))
    three = cases.recipe("muon", "auto", **gpus, devices="auto", nodes=3)
    with pytest.raises(UserError, match=r"trainer\.batch_size: 4 sequences do not split over 6"):
        count_processes(three)


def test_only_the_command_line_starts_processes(place):
    recipe = cases.recipe("muon", devices=2)
    run = runs.create(recipe, stem="tiny")
    with pytest.raises(UserError, match="only `train` and `resume` start them"):
        fit(run, recipe, cases.corpus(recipe), progress=False)
