"""A bare step is the trainer's step, and the optimizer's matrices are all of them."""

import time

import pytest
import torch

from nano_moe import checkpoints, runs
from nano_moe.bench import optimizer, startup, step
from nano_moe.bench.bare import PARTS, BareStep
from nano_moe.bench.recipes import (
    DECODERS,
    RandomTokens,
    prepared,
    random_text,
    recipe,
    text_folder,
)
from nano_moe.bench.timing import Timings
from nano_moe.training.fit import fit
from nano_moe.training.module import Decoder
from nano_moe.training.optimizers import MuonAdamW, parameter_groups


def test_the_bare_loop_trains_as_the_trainer_does():
    """From equal weights on equal batches to equal weights, so the two times compare."""
    n_steps = 6
    with text_folder(20_000) as (folder, data):
        changes = (*data, *startup.NEVER, f"trainer.steps={n_steps}", "optim.warmup_steps=0")
        chosen = recipe(startup.MODEL, *changes, quick=True)
        corpus = prepared(chosen)
        watch = startup.Alternate(startup._bare(chosen, corpus))
        run = runs.create(chosen, stem="x", root=folder / "checkpoints")
        with startup.timed_logging() as calls:
            fit(run, chosen, corpus, progress=False, watchers=[lambda _: watch])
        saved = checkpoints.read_checkpoint(run.last)["state_dict"]
        bare = startup._bare(chosen, corpus)
        for number in range(n_steps):
            bare.run(number)
    assert {name: len(times) for name, times in watch.seconds.items()} == {
        "fit": n_steps - 2,  # all but the first and the last
        "bare loop": n_steps - 2,
    }
    assert [step for step, _ in calls] == list(range(1, n_steps + 1))
    assert all(seconds > 0 for _, seconds in calls)
    for name, weight in bare.module.state_dict().items():
        torch.testing.assert_close(saved[name], weight, msg=name)


def test_parts_of_a_step_sum_to_one():
    chosen = recipe("dense", quick=True)
    bare = BareStep(Decoder(chosen), RandomTokens(chosen))
    for number in range(3):
        assert bare.run(number) == pytest.approx(sum(bare.seconds[p][-1] for p in PARTS))
    bare.seconds = {"forward": [9, 1, 1], "backward": [9, 2, 2], "optimizer": [9, 1, 1]}
    assert bare.shares(rounds=2) == {"forward": 0.25, "backward": 0.5, "optimizer": 0.25}


@pytest.mark.parametrize("quick", [False, True])
def test_decoders_differ_in_their_ffn_alone(quick):
    models = {name: recipe(name, quick=quick).model for name in DECODERS}
    sparse = [m for m in models.values() if m.moe is not None]
    assert len({m.model_copy(update={"moe": None}) for m in sparse}) == 1
    eight, fine, wide = sparse
    assert eight.expert_width * 2 == fine.expert_width * 8
    assert wide.expert_width == eight.expert_width and wide.moe.n_experts == 64


def test_ratios_are_over_the_faster_dense_and_growth_over_eight_experts():
    chosen = recipe("dense", quick=True)
    one = BareStep(Decoder(chosen), RandomTokens(chosen))
    one.seconds = {part: [1.0, 1.0] for part in PARTS}
    seconds = {name: [12.0, 12.0] for name in DECODERS} | {"dense": [10.0, 10.0]}
    seconds |= {step.SEPARATE: [8.0, 8.0], "8 experts top-2": [8.0, 8.0]}
    rows = {
        r["decoder"]: r for r in step.table("fp32", dict.fromkeys(seconds, one), Timings(seconds))
    }
    assert rows["8 experts top-2"]["ratio"].median == 1 and rows["8 experts top-2"]["met"] is True
    assert rows["64 experts top-8"]["ratio"].median == rows["64 experts top-8"]["growth"].median
    assert rows["64 experts top-8"]["met"] is False  # 1.5 is over both limits
    assert (
        rows["64 experts top-2"]["met"] is None and rows["64 experts top-2"]["growth"].median == 1.5
    )


@pytest.mark.parametrize("name", DECODERS)
def test_the_iteration_that_is_timed_is_of_all_hidden_weights(name):
    model = optimizer._model_with_gradients(name, True)
    config = recipe(name, quick=True).optim
    muon = MuonAdamW(parameter_groups(model, config), config)
    start = time.perf_counter()
    seconds, stacks = optimizer.iterating(muon)
    assert 0 < seconds < time.perf_counter() - start
    hidden = [n for n, p in model.named_parameters() if p.ndim > 1 and "router" not in n]
    weights = dict(model.named_parameters())
    expected = sum(weights[n].numel() for n in hidden if "embedding" not in n and "head" not in n)
    assert sum(stack.numel() for stack in stacks) == expected


def test_random_tokens_and_words_repeat_and_are_uneven():
    chosen = recipe("dense", quick=True)
    batch = RandomTokens(chosen)
    assert torch.equal(batch(3), batch(3)) and not torch.equal(batch(3), batch(4))
    assert batch(0).shape == (chosen.trainer.batch_size, chosen.model.context + 1)
    many = torch.cat([batch(number).flatten() for number in range(200)])
    assert many.max() < chosen.model.vocab_size
    assert (many < 50).sum() > 4 * (many >= chosen.model.vocab_size - 50).sum()
    assert random_text(500) == random_text(500) and len(random_text(500).split()) == 500
