"""The tasks: what they ask, and that our figures are those of plain sums and of the harness.

Shapes: T time, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

from nano_moe import recipe_file, runs
from nano_moe.errors import UserError
from nano_moe.evaluation import evaluate
from nano_moe.model.gpt import GPT
from nano_moe.runs import Run
from nano_moe.tasks.harness import write_tasks
from nano_moe.tasks.items import FAULTS, OTHERS, documents, make_tasks
from nano_moe.tasks.score import score

CONTEXT = 96


@pytest.fixture(scope="module")
def model(moe_config, build) -> GPT:
    """Sharp enough that greedy choices and pairs differ from chance by no rounding."""
    return build(moe_config(context=CONTEXT, init_std=0.4, qk_norm=True, d_ff=48)).eval()


@pytest.fixture(scope="module")
def tasks(stories):
    return make_tasks(stories, context=CONTEXT, seed=0, n=12)


def test_items_are_of_the_validation_text(stories, tasks):
    text = "\n".join(text for _, text in documents(stories))
    assert len(tasks.passages) == len(tasks.cloze) == 12
    for item in tasks.passages:
        assert item["text"] in text
    for item in tasks.cloze:
        assert f"{item['context']} {item['target']}" in text
        assert item["target"] in item["context"]
    joined = " ".join(text.split())
    for item in tasks.pairs:
        assert item["good"] in joined and item["bad"] not in joined
        assert len(stories.tokenizer.encode(item["bad"])) <= CONTEXT


def test_documents_are_whole(stories):
    n_bytes = sum(len(text.encode()) for _, text in documents(stories))
    assert n_bytes == stories.val.n_bytes.sum()
    assert {domain for domain, _ in documents(stories)} == set(stories.domains)


def test_faults_are_small(tasks):
    by_kind = {kind: [p for p in tasks.pairs if p["kind"] == kind] for kind in FAULTS}
    assert all(by_kind.values())
    for pair in by_kind["word order"]:
        assert sorted(pair["good"][:-1].split()) == sorted(pair["bad"][:-1].split())
    for pair in by_kind["spelling"]:
        differ = [
            i for i, (a, b) in enumerate(zip(pair["good"], pair["bad"], strict=True)) if a != b
        ]
        assert len(differ) == 2 and differ[1] == differ[0] + 1
    for pair in by_kind["word form"]:
        good, bad = pair["good"][:-1].split(), pair["bad"][:-1].split()
        ((one, other),) = [(a, b) for a, b in zip(good, bad, strict=True) if a != b]
        assert OTHERS[one] == other
        assert pair["domain"] == "tales", "other languages have no English word forms"


def test_a_seed_draws_the_same_items_and_another_draws_others(stories, tasks):
    assert make_tasks(stories, context=CONTEXT, seed=0, n=12) == tasks
    assert make_tasks(stories, context=CONTEXT, seed=1, n=12) != tasks


def test_what_does_not_fit_the_context_is_not_asked(stories):
    short = make_tasks(stories, context=20, seed=0, n=12)
    assert short.pairs == []
    assert len(short.passages) == 12


def test_text_without_passages_is_refused(tiny_corpus):
    empty = make_tasks(tiny_corpus, context=12, seed=0, n=2)
    assert empty.pairs == []
    val = tiny_corpus.val
    bare = type(val)(val.tokens[:10], val.starts[:1], val.domain_ids[:1], val.n_bytes[:1])
    with pytest.raises(UserError, match="no text to make tasks of"):
        make_tasks(type(tiny_corpus)(**vars(tiny_corpus) | {"val": bare}), context=12, seed=0, n=2)


@torch.no_grad()
def nats_of(model: GPT, before: list[int], ids: list[int]) -> torch.Tensor:
    """(T,) nats of each id, one after the other."""
    found = []
    for place, token in enumerate(ids):
        logits = model(torch.tensor([before + ids[:place]]))[0][0, -1]
        found.append(logits.log_softmax(-1)[token])
    return torch.stack(found)


def test_pairs_and_cloze_are_sums_over_their_tokens(model, stories, tasks):
    tokenizer = stories.tokenizer
    few = type(tasks)([], tasks.pairs[::9], tasks.cloze)
    said = score(model, tokenizer, few, batch_size=5)
    right = [
        nats_of(model, [tokenizer.end_id], tokenizer.encode(pair["good"])).sum()
        >= nats_of(model, [tokenizer.end_id], tokenizer.encode(pair["bad"])).sum()
        for pair in few.pairs
    ]
    assert said["pairs"]["accuracy"] == sum(right) / len(right)
    total = 0.0
    for item in tasks.cloze:
        context, target = (tokenizer.encode(t) for t in (item["context"], " " + item["target"]))
        window = (context + target)[-CONTEXT - 1 :][: -len(target)]  # the word may not slide it
        with torch.no_grad():
            logits = model(torch.tensor([[*window, *target[:-1]]]))[0][0, -len(target) :]
        total += logits.log_softmax(-1)[range(len(target)), target].sum().item()
    assert said["cloze"]["perplexity"] == pytest.approx(
        math.exp(-total / len(tasks.cloze)), rel=1e-4
    )


def test_bits_per_byte_of_short_passages_are_those_of_an_evaluation(model, stories, tasks):
    """Of text that fits the context there is one way to count."""
    text = "The fox was near the river with him at night."
    short = type(tasks)([{"text": text, "domain": "tales"}], [], [])
    said = score(model, stories.tokenizer, short, batch_size=4)
    nats = nats_of(model, [stories.tokenizer.end_id], stories.tokenizer.encode(text)).sum().item()
    assert said["bits_per_byte"] == pytest.approx(-nats / math.log(2) / len(text), rel=1e-5)
    assert said["pairs"] is said["cloze"] is None


def test_bits_per_byte_are_near_those_of_the_whole_split(model, stories):
    everything = make_tasks(stories, context=CONTEXT, seed=0, n=10_000)
    said = score(model, stories.tokenizer, everything, batch_size=16)["bits_per_byte"]
    whole = evaluate(model, stories, batch_size=16, precision="fp32").overall.bpb
    assert said == pytest.approx(whole, rel=0.05)


def test_batches_and_modes_change_nothing(model, stories, tasks):
    model.train()
    one = score(model, stories.tokenizer, tasks, batch_size=1)
    assert model.training
    many = score(model.eval(), stories.tokenizer, tasks, batch_size=64)
    assert one["pairs"] == many["pairs"]
    assert one["bits_per_byte"] == pytest.approx(many["bits_per_byte"], rel=1e-6)


def test_what_sees_the_future_is_refused(moe_config, build, stories, tasks):
    config = moe_config(moe={"routing": "expert_choice"}, context=CONTEXT)
    with pytest.raises(UserError, match="sees the future"):
        score(build(config), stories.tokenizer, tasks, batch_size=4)


HARNESS = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness: pip install --editable '.[eval]'",
)


@HARNESS
def test_the_harness_computes_the_same_on_the_exported_folder(
    model, stories, tasks, recipe_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert os.environ["HF_HUB_OFFLINE"]
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from nano_moe.export.hugging_face import export, loading_options

    names = write_tasks(tmp_path / "tasks", tasks)
    run, folder = run_of(model, stories, recipe_of, tmp_path / "run"), tmp_path / "out"
    export(run, folder)
    options = loading_options(model.config) | {"dtype": "float32", "add_bos_token": False}
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=4, **options)
    manager = TaskManager(include_path=[str(tmp_path / "tasks")], include_defaults=False)
    found = simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    theirs = {name: found["results"][name] for name in names}
    ours = score(model, stories.tokenizer, tasks, batch_size=4)
    bits = theirs["nano_moe_bpb"]["bits_per_byte,none"]
    assert ours["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert ours["pairs"]["accuracy"] == theirs["nano_moe_pairs"]["acc,none"]
    assert ours["cloze"]["accuracy"] == theirs["nano_moe_cloze"]["acc,none"]
    perplexity = theirs["nano_moe_cloze"]["perplexity,none"]
    assert ours["cloze"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def run_of(model: GPT, stories, recipe_of, path: Path) -> Run:
    """A finished run's folder with the model as its best weights."""
    run, recipe = Run(path), recipe_of(model.config, data={"tokenizer": "byte"})
    path.mkdir()
    run.recipe_file.write_text(recipe_file.dump(recipe))
    stories.tokenizer.save(run.tokenizer_file)
    runs.write_json(run.manifest_file, {"corpus": {"sha256": stories.sha256}})
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"nano_moe": {"schema": 1}, "state_dict": state, "global_step": 4}, run.best)
    return run
