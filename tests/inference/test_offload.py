"""Experts on disk: the same results within any budget, and never more in memory than it allows."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from nano_moe import runs
from nano_moe.errors import UserError
from nano_moe.inference import expert_file
from nano_moe.inference.decoding import Decoding
from nano_moe.inference.expert_file import EXPERTS, REST, split_weights
from nano_moe.inference.offload import ExpertStore, load_offloaded, slots_of
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.moe import MoE
from nano_moe.runs import SCHEMA, Run

KINDS = {
    "softmax": {},
    "hash": {"routing": "hash"},
    "window": {"router_window": 2},
    "sigmoid": {"score": "sigmoid", "bias_update_rate": 0.01, "n_shared_experts": 1, "d_expert": 8},
    "one-layer": {"first_k_dense": 1},
}


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")
READ_ALL = """
import json, sys
from pathlib import Path
from nano_moe.inference.expert_file import ExpertFile
from nano_moe.inference.offload import ExpertStore
from nano_moe.memory import memory_of

FIELDS = ("RssAnon", "RssFile", "RssShmem")
store = ExpertStore(ExpertFile(Path(sys.argv[1])), 8)

def read(keys):
    for key in keys:
        store.guess([key][: key[1] % 2])  # every other one by the thread that reads ahead
        store.get(key)
        store.let_go(key)

read(store.file.keys[:8])  # what the first reading loads of the libraries is none of the file
before = [memory_of(field) for field in FIELDS]
read(store.file.keys)
print(json.dumps([memory_of(field) - then for field, then in zip(FIELDS, before)]))
"""


SPLIT = """
import sys
from pathlib import Path
from nano_moe.inference.expert_file import split_weights
from nano_moe.memory import memory_of
from nano_moe.runs import Run

small, large = (Run(Path(folder)) for folder in sys.argv[1:])
split_weights(small)  # what the first splitting loads of the libraries is no weight's
before = memory_of("VmHWM")
split_weights(large)
print(memory_of("VmHWM") - before)
"""


@pytest.fixture
def saved(tmp_path, moe_config, recipe_of):
    """saved(kind, **model fields) -> (run, its decoder), untrained and written as a checkpoint."""

    def make(kind="softmax", seed=0, **fields) -> tuple[Run, GPT]:
        recipe = recipe_of(moe_config(moe={"n_experts": 6, **KINDS[kind]}, **fields))
        run = Run(tmp_path / kind)
        if not run.path.exists():
            runs.create(recipe, stem="run", name=kind, root=tmp_path)
        model = init_weights(GPT(recipe.model), seed).eval()
        state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
        checkpoint = {"nano_moe": {"schema": SCHEMA}, "state_dict": state, "global_step": 7}
        torch.save(checkpoint, run.best)
        return run, model

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["20%", "50%", "100%"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_logits_are_those_of_the_whole_model(saved, tokens, kind, budget, policy, prefetch):
    run, whole = saved(kind)
    if kind == "one-layer" and budget == "20%":
        budget = "34%"
    _, model, step, store = load_offloaded(run, budget, policy=policy, prefetch=prefetch)
    assert step == 7
    for piece in (tokens, tokens[:1, :1], tokens[:, :3], tokens[:1, :1]):
        found, wanted = model(piece), whole(piece)
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-6)
        assert len(store.slots) <= len(store.first)
    assert set(store.slots.values()) <= set(range(len(store.first)))
    assert len(set(store.slots.values())) == len(store.slots) and not store.held
    if budget == "100%" and not prefetch:
        assert store.counts.misses == len(store.slots)  # each was read once


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["34%", "100%"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_decoding_by_kernels_is_that_of_the_whole_model(saved, kind, budget, prefetch):
    run, whole = saved(kind)
    _, model, _, store = load_offloaded(run, budget, prefetch=prefetch)
    rows = [[1, 2, 3], [4], [5, 6]]
    ours, theirs = Decoding(model, rows), Decoding(whole, rows)
    for token in range(6):
        torch.testing.assert_close(ours.next_logits(), theirs.next_logits(), rtol=0, atol=1e-6)
        for one in (ours, theirs):
            one.append([token, token + 1, token], [True] * 3)
    by_kernels = kind not in ("hash", "window")
    assert all((one._step is not None) == by_kernels for one in (ours, theirs))
    assert len(store.slots) <= len(store.first) and not store.held


def test_the_model_holds_no_expert_of_its_own(saved):
    run, whole = saved(tie_embeddings=False)
    _, model, _, store = load_offloaded(run, "50%")
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters() if ".experts." not in name}
    assert store.first.numel() + store.down.numel() == 6 * 3 * 16 * 16
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@linux
def test_nothing_that_was_read_stays_in_memory_beside_the_slots(tmp_path):
    file, n_experts, width = tmp_path / EXPERTS, 128, 128  # 24 MiB
    shapes = {"first": (2 * width, width), "down": (width, width)}
    names = [(f"0.{i}.{part}", shape) for i in range(n_experts) for part, shape in shapes.items()]
    save_file({name: torch.ones(shape) for name, shape in names}, file)
    command = [sys.executable, "-c", READ_ALL, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert max(json.loads(done.stdout)) < 2**20  # of no kind: own, the file's, or shared


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_hits_are_those_of_the_policy_by_hand(saved, policy):
    run, _ = saved()
    file, _, _ = split_weights(run)
    store, chance = ExpertStore(file, 3, policy), random.Random(0)
    calls = [chance.choice(file.keys[:7]) for _ in range(200)]
    inside, uses, hits = [], Counter(), 0
    for key in calls:
        uses[key] += 1
        hits += key in inside
        if key in inside:
            inside.remove(key)
        elif len(inside) == 3:
            inside.remove(inside[0] if policy == "lru" else min(inside, key=lambda k: uses[k]))
        inside.append(key)
        store.get(key)
        store.let_go(key)
    assert store.counts.hits == hits and store.counts.misses == 200 - hits
    assert set(store.slots) == set(inside)


def test_a_store_never_hands_out_another_experts_weights(saved):
    run, whole = saved()
    file, _, _ = split_weights(run)
    store, chance = ExpertStore(file, 4), random.Random(1)
    for _ in range(300):
        store.guess([chance.choice(file.keys) for _ in range(2)])
        layer, expert = key = chance.choice(file.keys)
        first, down = store.get(key)
        experts = whole.blocks[layer].ffn.experts
        assert torch.equal(first, experts.gate_up[expert])
        assert torch.equal(down, experts.down[expert])
        store.let_go(key)


def test_a_right_guess_is_a_hit(saved):
    run, _ = saved()
    file, _, _ = split_weights(run)
    store = ExpertStore(file, 4)
    store.guess([(0, 1), (0, 2)])
    store.get((0, 1))
    assert store.counts._replace(waited=0) == (1, 0, 0, 2, 1)
    store.count_anew()
    store.get((0, 2))  # guessed before
    assert store.counts._replace(waited=0) == (1, 0, 0, 0, 0)


def test_files_are_made_once_and_again_for_another_checkpoint(saved, monkeypatch):
    run, _ = saved()
    split_weights(run)
    made = (run.path / EXPERTS).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(expert_file, "fill", lambda *_, **__: pytest.fail("made again"))
        split_weights(run)
    _, other = saved(seed=1)
    file, _, _ = split_weights(run)
    first, down = torch.empty(file.shapes[0]), torch.empty(file.shapes[1])
    file.read(1, 5, first, down)
    assert torch.equal(first, other.blocks[1].ffn.experts.gate_up[5])
    assert (run.path / EXPERTS).stat().st_mtime_ns > made
    (run.path / EXPERTS).write_bytes((run.path / EXPERTS).read_bytes()[:1000])
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = run.path / f".{EXPERTS}.{ended.pid}.tmp"  # by a process that was killed
    left.touch()
    file, _, _ = split_weights(run)  # a torn file is made again
    assert not left.exists()
    file.read(0, 0, first, down)
    assert torch.equal(down, other.blocks[0].ffn.experts.down[0])


@pytest.mark.parametrize("kind", ["softmax", "hash", "one-layer"])
def test_the_files_are_what_safetensors_would_write(saved, kind):
    run, whole = saved(kind, tie_embeddings=False)
    split_weights(run)
    experts = {
        f"{layer}.{number}.{part}": weight[number].detach().clone()
        for layer, block in enumerate(whole.blocks)
        if isinstance(block.ffn, MoE)
        for part, weight in zip(("first", "down"), block.ffn.experts.weights, strict=True)
        for number in range(6)
    }
    rest = {name: w for name, w in whole.state_dict().items() if ".experts." not in name}
    for path, wanted in ((run.path / EXPERTS, experts), (run.path / REST, rest)):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["step"] == "7" and metadata["checkpoint"].startswith("best.ckpt ")
        ours, theirs = path.read_bytes(), save(wanted, metadata)
        size = 8 + int.from_bytes(theirs[:8], "little")
        assert (ours[:8], ours[size:]) == (theirs[:8], theirs[size:])
        headers = [json.loads(one[8:size]) for one in (ours, theirs)]
        assert headers[0] == headers[1] and list(headers[0]) == list(headers[1])


@linux
def test_splitting_holds_no_second_copy_of_the_experts(saved):
    small, _ = saved("softmax")
    run, whole = saved("window", d_model=256, d_ff=1024)
    experts = sum(w.nbytes for name, w in whole.named_parameters() if ".experts." in name)
    assert experts > 15e6
    command = [sys.executable, "-c", SPLIT, str(small.path), str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5 * experts + 4e6  # pages of the mapped checkpoint are counted


def test_a_dense_run_is_refused(tmp_path, dense_config, recipe_of):
    run = runs.create(recipe_of(dense_config()), stem="run", name="dense", root=tmp_path)
    with pytest.raises(UserError, match="a dense run has no experts"):
        load_offloaded(run, "25%")


@pytest.mark.parametrize("share", [10, 25, 50, 100])
def test_a_share_holds_as_many_experts_as_it_says(moe_config, recipe_of, share):
    recipe = recipe_of(moe_config())
    for n_experts in range(20, 200):
        file = SimpleNamespace(keys=range(n_experts), expert_bytes=6144)
        assert slots_of(f"{share}%", file, recipe) == n_experts * share // 100


def test_the_least_budget_that_a_refusal_names_is_enough():
    for n_experts in range(4, 200):
        file = SimpleNamespace(keys=range(n_experts), expert_bytes=6144)
        recipe = SimpleNamespace(model=SimpleNamespace(moe=SimpleNamespace(top_k=3)))
        with pytest.raises(UserError, match="give .*% or more") as refused:
            slots_of("0.1%", file, recipe)
        least = re.search(r"give (\S+) or more", str(refused.value))[1]
        assert slots_of(least, file, recipe) >= 3


@pytest.mark.parametrize("budget", ["", "%", "25", "-5%", "0MB", "nan%", "infGB", "1e999MB", "2TB"])
def test_a_budget_that_is_none_is_refused(saved, budget):
    run, _ = saved()
    with pytest.raises(UserError, match="--expert-budget"):
        load_offloaded(run, budget)


def test_a_router_of_several_positions_is_not_guessed_for(saved):
    """A row of prompts at one position is not a row of positions."""
    for kind, ahead in (("softmax", True), ("window", False)):
        _, model, _, _ = load_offloaded(saved(kind)[0], "50%", prefetch=True)
        guessing = [bool(block.ffn.experts.ahead) for block in model.blocks]
        assert any(guessing) == ahead
