"""What one optimizer step does: losses, gradients, clipping, accumulation, the balancing bias."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from nano_moe.training import data
from nano_moe.training.module import Decoder
from nano_moe.training.optimizers import MuonAdamW

# Loss and gradient norm of the first three steps, on one thread in fp32.
GOLDEN = {
    "dense": ((5.620037, 2.165802), (5.266644, 2.331870), (4.999348, 3.186878)),
    "softmax": ((5.642901, 2.151338), (5.299341, 2.343290), (5.047365, 3.238918)),
    "sigmoid": ((5.619867, 2.156206), (5.267418, 2.332069), (5.010838, 3.185995)),
}


@pytest.fixture
def steps(workshop, monkeypatch):
    """Per optimizer step: outputs of its micro-batches, gradients before and after clipping."""
    seen: list[dict] = []
    outputs: list[dict] = []
    forward, norms, step = (
        Decoder.training_step,
        Decoder.on_before_optimizer_step,
        MuonAdamW.step,
    )

    def training_step(module, batch, batch_idx):
        outputs.append(forward(module, batch, batch_idx))
        return outputs[-1]

    def gradients(module):
        return {n: p.grad.clone() for n, p in module.model.named_parameters()}

    def on_before_optimizer_step(module, optimizer):
        raw = gradients(module)
        norms(module, optimizer)
        found = {"module": module, "outputs": outputs[:], "raw": raw}
        seen.append(found | {"norms": dict(module.gradient_norms)})
        outputs.clear()

    def optimizer_step(optimizer, closure=None):
        def marked():
            loss = closure()
            seen[-1]["applied"] = gradients(seen[-1]["module"])
            seen[-1]["lr"] = {group["name"]: group["lr"] for group in optimizer.param_groups}
            return loss

        return step(optimizer, marked)

    monkeypatch.setattr(Decoder, "training_step", training_step)
    monkeypatch.setattr(Decoder, "on_before_optimizer_step", on_before_optimizer_step)
    monkeypatch.setattr(MuonAdamW, "step", optimizer_step)
    return seen


def whole_norm(gradients, part: str = "") -> float:
    return get_total_norm([g for name, g in gradients.items() if part in name]).item()


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_first_steps_are_those_of_before(workshop, steps, kind):
    workshop.train(workshop.recipe(kind, trainer__steps=3))
    found = tuple(
        (step["outputs"][0]["loss"].item(), step["norms"]["total"].item()) for step in steps
    )
    assert found == tuple(pytest.approx(pair, rel=1e-5) for pair in GOLDEN[kind]), (
        f"the first losses and gradient norms of '{kind}' changed to {found}. If the change is "
        "meant (initialisation, data order, architecture, optimizer or loss), put these into "
        "GOLDEN and say in the commit why; runs of before do not compare to runs from now on"
    )


@pytest.mark.parametrize("kind", ["dense", "softmax", "sigmoid"])
def test_one_batch_is_learned_by_heart(workshop, monkeypatch, steps, kind):
    """Four random sequences, seen again at every step, with distinct first tokens."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (4, 17), generator=generator)
    batch[:, 0] = torch.arange(4)
    monkeypatch.setattr(data.Windows, "__getitem__", lambda self, index: batch[index % 4])
    changes = {"trainer__steps": 120, "trainer__val_every": 999, "optim__lr": 0.02}
    workshop.train(workshop.recipe(kind, **changes))
    losses = [step["outputs"][0]["ce"].item() for step in steps]
    assert losses[0] > 5  # log 264 is 5.6
    assert losses[-1] < 0.02


def test_dense_and_sparse_of_one_seed_see_the_same_batches(workshop):
    workshop.observe()
    seen = []
    for kind in ("dense", "softmax", "sigmoid"):
        workshop.train(workshop.recipe(kind), kind)
        seen.append(workshop.seen())
    assert len(seen[0]) == 10
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other)) and len(other) == 10
    workshop.train(workshop.recipe(seed=6), "other")
    assert not all(map(torch.equal, seen[0], workshop.seen()))


def test_dense_and_sparse_of_one_seed_start_from_the_same_shared_weights(workshop):
    weights = {
        kind: dict(Decoder(workshop.recipe(kind)).model.named_parameters())
        for kind in ("dense", "softmax", "sigmoid")
    }
    dense = weights.pop("dense")
    for kind, sparse in weights.items():
        shared = dense.keys() & sparse.keys()
        for part in ("embedding", "attention.", "norm.weight", "o_proj", "q_norm"):
            assert {n for n in dense if part in n} == {n for n in shared if part in n}
        assert any(".ffn." in name for name in shared) == (kind == "sigmoid")  # layer 0 is dense
        for name in shared:
            assert torch.equal(dense[name], sparse[name]), name


def test_batches_do_not_depend_on_how_they_are_cut_into_micro_batches(workshop):
    workshop.observe()
    workshop.train(workshop.recipe(trainer__batch_size=8, trainer__steps=4), "whole")
    whole = torch.cat(workshop.seen())
    changes = {"trainer__batch_size": 2, "trainer__accumulate": 4, "trainer__steps": 4}
    workshop.train(workshop.recipe(**changes), "cut")
    assert torch.equal(torch.cat(workshop.seen()), whole)


def test_accumulated_gradients_equal_those_of_one_large_batch(workshop, steps):
    workshop.train(workshop.recipe(trainer__batch_size=8, trainer__steps=3), "whole")
    changes = {"trainer__batch_size": 4, "trainer__accumulate": 2, "trainer__steps": 3}
    workshop.train(workshop.recipe(**changes), "cut")
    whole, cut = steps[:3], steps[3:]
    assert len(cut) == 3
    for name, gradient in whole[0]["raw"].items():
        torch.testing.assert_close(cut[0]["raw"][name], gradient, rtol=1e-4, atol=1e-8)
    for one, parts in zip(whole, cut, strict=True):
        mean = sum(output["ce"] for output in parts["outputs"]) / 2
        assert len(parts["outputs"]) == 2
        assert mean.item() == pytest.approx(one["outputs"][0]["ce"].item(), rel=1e-4)


@pytest.mark.parametrize("limit", [0.05, 1000.0, 0.0])
def test_clipping_bounds_what_the_optimizer_sees(workshop, steps, limit):
    workshop.train(workshop.recipe("softmax", optim__grad_clip=limit, trainer__steps=3))
    for step in steps:
        raw, applied = whole_norm(step["raw"]), whole_norm(step["applied"])
        assert raw > 0.1
        assert applied == pytest.approx(min(raw, limit) if limit else raw, rel=1e-4)
        if limit:
            parameters = {n: torch.nn.Parameter(g.clone()) for n, g in step["raw"].items()}
            for name, parameter in parameters.items():
                parameter.grad = step["raw"][name].clone()
            clip_grad_norm_(parameters.values(), limit)
            for name, parameter in parameters.items():
                torch.testing.assert_close(step["applied"][name], parameter.grad)


def test_reported_norms_are_those_before_clipping(workshop, steps):
    workshop.train(workshop.recipe("softmax", optim__grad_clip=0.05, trainer__steps=2))
    for step in steps:
        for part, name in (("total", ""), ("router", ".router."), ("experts", ".experts.")):
            found = step["norms"][part].item()
            assert found == pytest.approx(whole_norm(step["raw"], name), rel=1e-5)
        squares = step["norms"]["router"] ** 2 + step["norms"]["experts"] ** 2
        assert squares < step["norms"]["total"] ** 2


def test_the_loss_is_cross_entropy_plus_weighted_terms_over_all_layers(workshop, steps):
    changes = {"trainer__steps": 1, "model__n_layers": 3}
    workshop.train(workshop.recipe("softmax", **changes), "weighted")
    (output,) = steps[0]["outputs"]
    balance, z = output["load_balancing_loss"], output["router_z_loss"]
    assert balance.shape == z.shape == (3,)
    assert (balance >= 0.99).all()
    expected = output["ce"] + 0.01 * balance.sum() + 0.001 * z.sum()
    assert output["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_coefficients_the_loss_is_cross_entropy_alone(workshop, steps):
    workshop.train(workshop.recipe("sigmoid", trainer__steps=2))
    for step in steps:
        assert step["outputs"][0]["loss"].item() == step["outputs"][0]["ce"].item()


def test_the_bias_moves_once_a_step_by_all_micro_batches_and_not_in_validation(workshop, steps):
    changes = {"trainer__steps": 12, "trainer__accumulate": 2, "trainer__val_every": 1}
    recipe = workshop.recipe("sigmoid", trainer__batch_size=1, optim__lr=1e-4, **changes)
    run, _ = workshop.train(recipe)
    counts = [[output["counts"][0].float() for output in step["outputs"]] for step in steps]
    assert all(sum(parts).sum() == 2 * 16 * 2 and len(parts) == 2 for parts in counts)

    def bias_after(loads):
        bias = torch.zeros(4)
        for load in loads:
            bias = bias + 0.01 * (load.mean() - load).sign()
            bias = bias - bias.mean()
        return bias

    found = workshop.checkpoint(run.last)["state_dict"]["model.blocks.1.ffn.router.expert_bias"]
    torch.testing.assert_close(found, bias_after([sum(parts) for parts in counts]))
    faulty = {
        "last micro-batch alone": [parts[-1] for parts in counts],
        "each micro-batch": [load for parts in counts for load in parts],
        "never reset": [sum(sum(p) for p in counts[: n + 1]) for n in range(12)],
    }
    for name, loads in faulty.items():  # these would show
        assert not torch.allclose(found, bias_after(loads)), name


def test_learning_rates_follow_the_schedule_from_the_first_step(workshop, steps):
    changes = {"optim__warmup_steps": 4, "optim__embedding_lr": 0.02, "optim__router_lr": 0.003}
    workshop.train(workshop.recipe("softmax", **changes))
    shares = [step["lr"]["hidden"] / 0.01 for step in steps]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0 < shares[-1] < 0.1
    for step, share in zip(steps, shares, strict=True):
        assert step["lr"]["embedding"] == pytest.approx(0.02 * share)
        assert step["lr"]["router"] == pytest.approx(0.003 * share)
