"""The worker's sides: the same decoder as ours under other names, on the same tokens."""

from __future__ import annotations

import ast

import pytest
import torch

from nano_moe.bench import peer_worker
from nano_moe.bench.peer_process import WORKER
from nano_moe.bench.peers import SHAPES, job
from nano_moe.bench.recipes import QUICK, recipe
from nano_moe.export.families import family_of
from nano_moe.export.tensors import cut, rules_of


def quick_job(shape, *changes):
    return job(recipe(shape.decoder, *shape.changes, *QUICK, *changes, quick=False))


def without_balancing(model):
    return model | {"moe": model["moe"] and model["moe"] | {"load_balancing_loss": 0.0}}


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name)
def shape(request):
    return request.param


def both(shape, model, batch_size):
    """Our side and transformers', with the same weights."""
    chosen = recipe(shape.decoder, *shape.changes, *QUICK, quick=False).model
    ours, theirs = (peer_worker.SIDES[side](model, batch_size) for side in ("ours", "transformers"))
    theirs.use({"experts": "eager", "attention": "eager"})
    rules = rules_of(family_of(chosen), chosen)
    theirs.model.load_state_dict(cut(ours.model.state_dict(), rules))
    return ours, theirs


def test_the_same_weights_give_transformers_our_loss(shape):
    made = quick_job(shape)
    ours, theirs = both(shape, without_balancing(made["model"]), made["batch_size"])
    for tokens, targets in peer_worker.random_tokens(512, 2, 16):
        torch.testing.assert_close(ours.loss(tokens, targets), theirs.loss(tokens, targets))


def test_transformers_adds_the_load_balancing_loss_too(shape):
    """Theirs is of all layers together, and top_k times ours (its floor is top_k)."""
    made = quick_job(shape)
    tokens, targets = peer_worker.random_tokens(512, 2, 16)[0]
    with_it = both(shape, made["model"], 2)
    without = both(shape, without_balancing(made["model"]), 2)
    added, theirs = (
        a.loss(tokens, targets) - b.loss(tokens, targets)
        for a, b in zip(with_it, without, strict=True)
    )
    moe = made["model"]["moe"]
    assert (added > 0) == (moe is not None)
    if moe is not None:
        torch.testing.assert_close(theirs, moe["top_k"] * added, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", ["ours", "transformers"])
def test_sides_hold_equally_many_parameters(shape, side):
    made = quick_job(shape)
    about = peer_worker.start({"side": side, **made, "threads": torch.get_num_threads()})[1]
    model = peer_worker.ours(made["model"], 2).model
    assert about["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_lower_the_loss_and_time_themselves(precision):
    made = quick_job(SHAPES[0])
    trainer, _ = peer_worker.start({"side": "ours", **made, "threads": torch.get_num_threads()})
    trainer.use({"precision": precision})
    first, later = trainer.steps(1), trainer.steps(40)
    assert len(later["seconds"]) == 40 and all(s > 0 for s in later["seconds"])
    assert later["loss"] < first["loss"]


def test_a_fault_leaves_the_worker_ready():
    made = quick_job(SHAPES[0])
    trainer, _ = peer_worker.start({"side": "ours", **made, "threads": torch.get_num_threads()})
    good, trainer.side.loss = trainer.side.loss, lambda tokens, targets: tokens.no_such_thing
    assert peer_worker.answer(trainer, {"steps": 1})["fault"].startswith("AttributeError: ")
    trainer.side.loss = good
    assert len(peer_worker.answer(trainer, {"steps": 2})["seconds"]) == 2


def test_the_largest_copies_of_weights_are_refused():
    made = quick_job(SHAPES[0])
    model = made["model"] | {"context": 2048, "d_model": 512, "n_layers": 1}
    model["moe"] = model["moe"] | {"d_expert": 512}
    side = peer_worker.transformers(model, 4)
    assert side.refused["experts"]["batched_mm"].startswith("would copy 48.0 GiB")


def test_the_worker_needs_torch_alone():
    """It runs where nano_moe is not: what a side needs is imported inside that side."""
    top = ast.parse(WORKER.read_text(encoding="utf-8")).body
    modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    known = {"argparse", "json", "os", "sys", "time", "typing", "dataclasses", "__future__"}
    assert modules <= known | {"collections.abc", "importlib.metadata", "torch"}
