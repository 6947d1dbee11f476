"""Upcycling: a sparse run starts as the dense run it came from, and trains on from its loss."""

import os
import shutil
import signal

import pytest
import torch

from nano_moe import checkpoints, runs
from nano_moe.errors import UserError
from nano_moe.evaluation import evaluate
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy
from nano_moe.model.upcycle import upcycle
from nano_moe.training.fit import fit

FULL = {"d_expert": 32, "n_experts": 4}  # as wide as the tiny dense FFN


@pytest.mark.parametrize(
    ("moe", "fields"),
    [
        ({"top_k": 2}, {}),
        ({"top_k": 4, "score": "sigmoid"}, {}),
        ({"top_k": 1, "n_experts": 1}, {}),
        ({"top_k": 2, "first_k_dense": 1}, {}),
        ({"top_k": 3, "routing": "hash"}, {}),
        ({"top_k": 2, "per_expert_scale": True}, {"activation": "gelu"}),
        ({"top_k": 2}, {"tie_embeddings": False, "qk_norm": True}),
    ],
)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    dense_config, moe_config, build, tokens, moe, fields
):
    dense = build(dense_config(**fields), seed=1)
    sparse = build(moe_config(moe=FULL | moe, **fields), seed=2)
    routers = {n: p.clone() for n, p in sparse.named_parameters() if ".router." in n}
    upcycle(sparse, dense)
    torch.testing.assert_close(sparse(tokens)[0], dense(tokens)[0], rtol=1e-4, atol=1e-4)
    for name, fresh in routers.items():
        assert torch.equal(sparse.get_parameter(name), fresh)
    for name, parameter in sparse.named_parameters():
        if ".experts." in name:
            assert all(torch.equal(parameter[0], expert) for expert in parameter)


def test_experts_part_ways_in_training(dense_config, moe_config, build, tokens):
    sparse = upcycle(build(moe_config(moe=FULL | {"top_k": 2})), build(dense_config(), seed=1))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.5)
    cross_entropy(sparse(tokens[:, :-1])[0], tokens[:, 1:]).backward()
    optimizer.step()
    down = sparse.blocks[0].ffn.experts.down
    assert all(not torch.equal(down[0], expert) for expert in down[1:])


def upcycled(workshop, **changes):
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 64, "init_from": "dense"}
    return workshop.recipe("softmax", model__moe=moe, **changes)


def test_training_goes_on_from_the_dense_runs_loss(workshop):
    dense, result = workshop.train(workshop.recipe("dense", trainer__steps=40), "dense")
    recipe = upcycled(workshop, trainer__steps=1, optim__lr=1e-9, trainer__val_every=1)
    run, first = workshop.train(recipe, "on")
    assert first.evaluation.overall.ce == pytest.approx(result.evaluation.overall.ce, abs=1e-3)
    before, after = (float(row["val/ce"]) for row in workshop.rows(run) if row["val/ce"])
    assert before == pytest.approx(result.evaluation.overall.ce, abs=1e-4)
    fresh = init_weights(GPT(recipe.model), recipe.seed)
    corpus = workshop.corpus(recipe)
    scratch = evaluate(fresh, corpus, batch_size=4, precision="fp32").overall.ce
    assert first.evaluation.overall.ce < scratch - 1
    _, later = workshop.train(upcycled(workshop, trainer__steps=40), "later")
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 64}
    _, from_scratch = workshop.train(
        workshop.recipe("softmax", model__moe=moe, trainer__steps=40), "scratch"
    )
    assert later.evaluation.overall.ce < result.evaluation.overall.ce
    assert later.evaluation.overall.ce < from_scratch.evaluation.overall.ce


def test_a_run_killed_in_its_first_step_is_scored_at_its_start_once(workshop):
    workshop.train(workshop.recipe("dense"), "dense")
    recipe = upcycled(workshop, trainer__steps=2)

    def killed() -> None:
        workshop.during(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        workshop.train(recipe, "on")

    assert workshop.in_child(killed) == -signal.SIGKILL
    run = runs.find("on")
    assert workshop.checkpoint(run.last)["global_step"] == 0
    workshop.resume(run)
    assert [row["step"] for row in workshop.rows(run) if row["val/ce"]] == ["0", "2"]


def test_weights_that_are_not_finite_are_no_start(workshop):
    dense, _ = workshop.train(workshop.recipe("dense"), "dense")
    for path in (dense.best, dense.last):
        checkpoint = workshop.checkpoint(path)
        checkpoint["state_dict"]["model.norm.weight"][0] = torch.nan
        torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"model\.moe\.init_from: .*not finite"):
        workshop.train(upcycled(workshop), "on")


def test_defaults_spelt_out_are_no_difference_and_another_split_is_warned_of(workshop, caplog):
    workshop.train(workshop.recipe("dense"), "dense")
    workshop.train(upcycled(workshop, model__head_dim=16, seed=6), "same")
    assert not caplog.records
    workshop.train(upcycled(workshop, data__val_fraction=0.5, seed=6), "other")
    assert "may have been trained on what is validation text here" in caplog.text
    caplog.clear()
    workshop.train(upcycled(workshop), "again")
    assert "its batches are seen a second time" in caplog.text


def test_the_manifest_says_what_the_weights_had_cost(workshop):
    dense, _ = workshop.train(workshop.recipe("dense"), "dense")
    run, _ = workshop.train(upcycled(workshop), "on")
    step = workshop.checkpoint(dense.best)["global_step"]
    tokens = step * 4 * 16
    flops = tokens * dense.manifest()["train_flops_per_token"]
    found = run.manifest()["init_from"]
    assert found == {"run": "dense", "step": step, "tokens": tokens, "flops": flops}


def test_an_upcycled_run_resumes_and_loads_without_its_source(workshop):
    workshop.train(workshop.recipe("dense"), "dense")
    whole, _ = workshop.train(upcycled(workshop), "whole")
    workshop.signal_at(5)
    stopped, result = workshop.train(upcycled(workshop), "stopped")
    assert result.step == 5
    shutil.rmtree("checkpoints/dense")
    workshop.resume(stopped)
    a, b = (workshop.checkpoint(run.last)["state_dict"] for run in (whole, stopped))
    assert workshop.differences(a, b) == []
    checkpoints.load_model(stopped)


@pytest.mark.parametrize(
    ("source", "changes", "parts"),
    [
        ("nowhere", {}, ["model.moe.init_from: run 'dense'", "no such run"]),
        ("sparse", {}, ["model.moe.init_from", "is sparse itself"]),
        ("dense", {"model__n_heads": 4}, ["model.n_heads is 2 in", "4 here", "make them equal"]),
        ("dense", {"data__files": ["other.txt"], "data__tokenizer": "char"}, ["vocabulary"]),
    ],
)
def test_a_source_that_does_not_fit_is_refused(workshop, source, changes, parts):
    if source != "nowhere":
        workshop.train(workshop.recipe("softmax" if source == "sparse" else "dense"), "dense")
    with open("other.txt", "w") as file:
        file.write("quite another text\n" * 30)
    recipe = upcycled(workshop, **changes)
    run = runs.create(recipe, stem="tiny", name="on")
    with pytest.raises(UserError) as fault:
        fit(run, recipe, workshop.corpus(recipe), progress=False)
    for part in parts:
        assert part in str(fault.value)
    assert not run.last.exists()
