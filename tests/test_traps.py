"""Known MoE mistakes, by number: each assertion holds for our code and fails for the mistake.

For every trap one function states the property. It is applied to our code, which passes, and to a
few lines that make the mistake as public code has made it, which must raise AssertionError.

Shapes: B batch, T time, N tokens, D d_model, E experts, K top_k, L layers.
"""

from __future__ import annotations

import copy
import importlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from nano_moe.config import MoEConfig, OptimConfig
from nano_moe.errors import UserError
from nano_moe.evaluation import evaluate
from nano_moe.export.families import family_of, model_of
from nano_moe.export.tensors import interleaved
from nano_moe.export.weights import weights_of
from nano_moe.model.balance import load_balancing_loss, load_statistics, updated_expert_bias
from nano_moe.model.experts import Experts, grouped, loop
from nano_moe.model.ffn import FFN
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.model.loss import cross_entropy
from nano_moe.model.moe import MoE
from nano_moe.model.ops import RMSNorm
from nano_moe.model.router import Router
from nano_moe.model.routing import (
    Routing,
    count_tokens,
    drop_overflow,
    gate_weights,
    limit_to_groups,
    probabilities_of,
    scores_of,
)
from nano_moe.studies import leak, plan
from nano_moe.studies.schema import Comparison, Member, Study
from nano_moe.training import elementwise
from nano_moe.training.balancing import Balancing
from nano_moe.training.data import TokenData
from nano_moe.training.module import Decoder
from nano_moe.training.optimizers import MuonAdamW, parameter_groups

RECIPES = Path(__file__).parent.parent / "recipes"
mistake = pytest.raises(AssertionError)
AUX_FREE = {"score": "sigmoid", "bias_update_rate": 0.1}


def routing_from(logits: torch.Tensor, top_k: int) -> Routing:
    """A softmax routing of given (N, E) logits."""
    probs = logits.softmax(-1)
    weights, ids = probs.topk(top_k)
    return Routing(ids, weights, probs, logits, count_tokens(ids.flatten(), logits.shape[-1]))


# T1: a gate that is always 1 gives the router no gradient


def assert_language_loss_moves_routers(model: GPT, tokens: torch.Tensor) -> None:
    cross_entropy(model(tokens)[0], tokens.roll(-1, 1)).backward()
    for block in model.blocks:
        assert block.ffn.router.weight.grad.norm() > 1e-3 * block.ffn.experts.gate_up.grad.norm()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, False), (2, True), (4, True)])
def test_t01_language_loss_moves_every_router(moe_config, build, tokens, score, top_k, normalize):
    moe = {"top_k": top_k, "score": score, "normalize_top_k": normalize}
    assert_language_loss_moves_routers(build(moe_config(moe=moe)), tokens)


class SoftmaxAfterTopK(Router):
    def forward(self, x, tokens=None, past=None):
        routing = super().forward(x, tokens, past)
        return routing._replace(weights=routing.logits.gather(-1, routing.ids).softmax(-1))


def test_t01_mistakes(moe_config, build, tokens):
    config = moe_config(moe={"top_k": 1})
    renormalizes, softmax_last = build(config), build(config)
    for router in renormalizes.routers:
        router.normalize = True
    for router in softmax_last.routers:
        router.__class__ = SoftmaxAfterTopK
    for model in (renormalizes, softmax_last):
        with mistake:
            assert_language_loss_moves_routers(model, tokens)


def test_t01_the_recipe_refuses_it_and_does_not_default_to_it(moe_config):
    with pytest.raises(ValueError, match="set normalize_top_k to false"):
        moe_config(moe={"top_k": 1, "normalize_top_k": True})
    assert not moe_config(moe={"top_k": 1}).moe.normalizes
    assert moe_config(moe={"top_k": 2}).moe.normalizes


def test_t01_the_demo_has_the_fault_and_only_at_top_1(moe_config, build, tokens):
    model = build(moe_config(moe={"top_k": 1, "normalize_top_k": "even_top_1"}))
    _, routings = model(tokens)
    assert all((routing.weights == 1).all() for routing in routings)
    with mistake:
        assert_language_loss_moves_routers(model, tokens)
    with pytest.raises(ValueError, match="even_top_1 is of top_k=1"):
        moe_config(moe={"top_k": 2, "normalize_top_k": "even_top_1"})


# T2: layers collapsed on different experts look balanced when concatenated


def assert_sees_collapsed_layers(mean_loss) -> None:
    layers = [routing_from(20 * torch.eye(4)[[e] * 64], top_k=1) for e in range(4)]
    assert mean_loss(layers) > 3.9


def test_t02_loss_is_per_layer():
    balancing = Balancing(MoEConfig(n_experts=4, top_k=1))
    assert_sees_collapsed_layers(lambda r: balancing.terms(r, 1)["load_balancing_loss"].mean())


def test_t02_mistake():
    def concatenated(layers):
        counts = torch.stack([layer.counts for layer in layers]).sum(0)
        return load_balancing_loss(counts=counts, probs=torch.cat([one.probs for one in layers]))

    with mistake:
        assert_sees_collapsed_layers(concatenated)


# T3: even loads cost 1 for every top_k


def assert_even_loads_cost_one(loss) -> None:
    for top_k in (1, 2, 4, 8):
        counts, probs = torch.full((8,), 10 * top_k), torch.full((80, 8), 1 / 8)
        assert abs(loss(counts=counts, probs=probs) - 1) < 1e-6


def test_t03_even_loads_cost_one_for_every_top_k():
    assert_even_loads_cost_one(load_balancing_loss)


def test_t03_one_is_no_floor_where_counts_and_probabilities_disagree():
    probs = torch.tensor([[0.51, 0.49]] * 6 + [[0.0, 1.0]] * 4)
    counts = torch.bincount(probs.argmax(-1))  # 6 and 4
    expected = 2 * (0.6 * 0.306 + 0.4 * 0.694)
    assert abs(load_balancing_loss(counts=counts, probs=probs) - expected) < 1e-6 < 1 - expected


def test_t03_mistake():
    def not_divided_by_k(*, counts, probs):
        return len(counts) * (counts / len(probs) * probs.mean(0)).sum()

    with mistake:
        assert_even_loads_cost_one(not_divided_by_k)


# T4: P_i is the whole distribution over experts, and sums to 1 whatever the scores' size


def assert_shrinking_scores_gains_nothing(probabilities) -> None:
    logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    for shift in (0.0, 10.0, 30.0, 80.0):
        probs = probabilities((logits - shift).sigmoid())
        loss = load_balancing_loss(counts=torch.full((4,), 16), probs=probs)
        assert abs(loss - 1) < 1e-5


def assert_loss_pushes_every_logit(routing: Routing) -> None:
    loss = load_balancing_loss(counts=routing.counts, probs=routing.probs)
    pushes = torch.autograd.grad(loss, routing.logits, retain_graph=True)[0]
    assert (pushes.abs() > 1e-6).all()


def test_t04_probabilities_are_normalized():
    assert_shrinking_scores_gains_nothing(lambda scores: probabilities_of(scores, "sigmoid"))


@pytest.mark.parametrize(
    "probabilities",
    [lambda scores: scores, lambda scores: scores / (scores.sum(-1, keepdim=True) + 1e-7)],
    ids=["raw sigmoid", "large epsilon"],
)
def test_t04_mistakes_of_scale(probabilities):
    with mistake:
        assert_shrinking_scores_gains_nothing(probabilities)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_t04_probabilities_cover_unchosen_experts(moe_config, build, score):
    torch.manual_seed(0)
    router = build(moe_config(moe={"score": score})).routers[0]
    routing = router(torch.randn(1, 16))
    assert_loss_pushes_every_logit(routing)
    only_chosen = torch.zeros(1, 4).scatter(1, routing.ids, routing.weights)
    with mistake:
        assert_loss_pushes_every_logit(routing._replace(probs=only_chosen))


# T5: one coefficient means one strength per layer, at any depth


def assert_strength_does_not_depend_on_depth(decoder_type, recipe_of, moe_config) -> None:
    """Nothing is written to the residual stream, so a router's gradient is that of its own loss."""
    batch = torch.randint(0, 264, (2, 13), generator=torch.Generator().manual_seed(0))
    gradients = []
    for n_layers in (1, 4):
        config = moe_config(moe={"load_balancing_loss": 0.5}, n_layers=n_layers)
        decoder = decoder_type(recipe_of(config))
        for block in decoder.model.blocks:
            nn.init.zeros_(block.ffn.experts.down)
            nn.init.zeros_(block.attention.o_proj.weight)
        decoder.training_step(batch, 0)["loss"].backward()
        gradients.append(decoder.model.routers[0].weight.grad)
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0])


def test_t05_loss_is_summed_over_layers(recipe_of, moe_config):
    assert_strength_does_not_depend_on_depth(Decoder, recipe_of, moe_config)


def test_t05_mistake(recipe_of, moe_config):
    class MeanOverLayers(Balancing):
        def weighted(self, terms):
            return {"load_balancing_loss": 0.5 * terms["load_balancing_loss"].mean()}

    def decoder(recipe):
        made = Decoder(recipe)
        made.balancing = MeanOverLayers(recipe.model.moe)
        return made

    with mistake:
        assert_strength_does_not_depend_on_depth(decoder, recipe_of, moe_config)


# T6: loads are counts, without a gradient; gradients are finite at perfect balance


def assert_counts_are_constants(loss) -> None:
    counts = torch.tensor([3.0, 1.0], requires_grad=True)
    probs = torch.tensor([[0.7, 0.3]], requires_grad=True)
    of_counts, of_probs = torch.autograd.grad(
        loss(counts=counts, probs=probs), (counts, probs), allow_unused=True
    )
    assert of_counts is None or not of_counts.any()
    assert of_probs.any()


def assert_gradient_is_finite_at_balance(loss) -> None:
    logits = torch.zeros(8, 4, requires_grad=True)
    value = loss(counts=torch.full((4,), 2), probs=logits.softmax(-1))
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_t06_only_probabilities_carry_gradient():
    assert_counts_are_constants(load_balancing_loss)
    assert_gradient_is_finite_at_balance(load_balancing_loss)


def test_t06_mistakes():
    def attached(*, counts, probs):
        return len(counts) * (counts / counts.sum() * probs.mean(0)).sum()

    def variation(*, counts, probs):
        return (probs.mean(0).var().sqrt() / probs.mean()).square()

    with mistake:
        assert_counts_are_constants(attached)
    with mistake:
        assert_gradient_is_finite_at_balance(variation)


# T7: one bias step per optimizer step, from the counts of all its micro-batches


def assert_one_bias_step_per_optimizer_step(decoder: Decoder) -> None:
    """Two optimizer steps of two micro-batches each; every micro-batch repeats one token."""
    (optimizer,), _ = decoder.configure_optimizers()
    expected = np.zeros((2, 4))
    for words in ((9, 38), (1, 4)):
        counts = np.zeros((2, 4))
        for word in words:
            output = decoder.training_step(torch.full((2, 13), word), 0)
            output["loss"].backward()
            counts += output["counts"].numpy()
        decoder.on_before_optimizer_step(optimizer)
        expected += 0.1 * np.sign(counts.mean(-1, keepdims=True) - counts)
        expected -= expected.mean(-1, keepdims=True)
        bias = torch.stack([router.expert_bias for router in decoder.model.routers])
        np.testing.assert_allclose(bias, expected, atol=1e-6)


def test_t07_bias_steps_once_per_optimizer_step(recipe_of, moe_config):
    assert_one_bias_step_per_optimizer_step(Decoder(recipe_of(moe_config(moe=AUX_FREE))))


class StepsPerMicroBatch(Decoder):
    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        for router, counts in zip(self.model.routers, output["counts"], strict=True):
            bias = updated_expert_bias(bias=router.expert_bias, counts=counts, rate=0.1)
            router.expert_bias.copy_(bias)
        self.balancing.counts = None
        return output


class NeverResetsCounts(Decoder):
    def on_before_optimizer_step(self, optimizer):
        counts = self.balancing.counts
        super().on_before_optimizer_step(optimizer)
        self.balancing.counts = counts


class KeepsLastMicroBatch(Decoder):
    def training_step(self, batch, batch_idx):
        self.balancing.counts = None
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("wrong", [StepsPerMicroBatch, NeverResetsCounts, KeepsLastMicroBatch])
def test_t07_mistakes(recipe_of, moe_config, wrong):
    with mistake:
        assert_one_bias_step_per_optimizer_step(wrong(recipe_of(moe_config(moe=AUX_FREE))))


# T8: activation checkpointing runs a forward pass twice and counts its tokens once


def step_with(checkpointing: bool, decoder_type, recipe_of, moe_config) -> tuple[Decoder, dict]:
    """A decoder after one training step and its bias step, and what the step gave out."""
    moe = {"score": "sigmoid", "bias_update_rate": 0.1, "bias_rule": "error", "noisy_top_k": True}
    trainer = {"activation_checkpointing": checkpointing}
    decoder = decoder_type(recipe_of(moe_config(moe=moe), trainer=trainer))
    (optimizer,), _ = decoder.configure_optimizers()
    torch.manual_seed(0)
    output = decoder.training_step(torch.arange(26).view(2, 13) % 7, 0)
    output["loss"].backward()
    decoder.on_before_optimizer_step(optimizer)
    return decoder, output


def assert_checkpointing_changes_nothing(decoder_type, recipe_of, moe_config) -> None:
    (plain, expected), (checkpointed, output) = (
        step_with(on, decoder_type, recipe_of, moe_config) for on in (False, True)
    )
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(checkpointed.get_parameter(name).grad, parameter.grad)
    for one, other in zip(plain.model.routers, checkpointed.model.routers, strict=True):
        assert one.expert_bias.abs().sum() > 0
        assert torch.equal(one.expert_bias, other.expert_bias)


def test_t08_checkpointing_counts_once(recipe_of, moe_config):
    assert_checkpointing_changes_nothing(Decoder, recipe_of, moe_config)


def test_t08_checkpointing_keeps_less_and_runs_twice(recipe_of, moe_config):
    kept, runs = [], []
    for on in (False, True):
        decoder = Decoder(recipe_of(moe_config(), trainer={"activation_checkpointing": on}))
        runs.append(0)

        def count_run(*_):
            runs[-1] += 1

        decoder.model.blocks[0].ffn.router.register_forward_hook(count_run)
        held: dict[int, int] = {}

        def hold(x, held=held):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            output = decoder.training_step(torch.arange(26).view(2, 13), 0)
        kept.append(sum(held.values()))
        output["loss"].backward()
    assert kept[1] < kept[0] / 2
    assert runs == [1, 2]


def test_t08_mistake(recipe_of, moe_config):
    def add_counts(total, router, args, routing):
        total += routing.counts

    class CountsInForward(Decoder):
        def training_step(self, batch, batch_idx):
            seen = torch.zeros(len(self.model.routers), 4, dtype=torch.int64)
            for row, router in zip(seen, self.model.routers, strict=True):
                router.register_forward_hook(partial(add_counts, row))
            return super().training_step(batch, batch_idx) | {"counts": seen}

    with mistake:
        assert_checkpointing_changes_nothing(CountsInForward, recipe_of, moe_config)


# T9: evaluation leaves no trace


def assert_evaluation_leaves_no_trace(model: GPT, corpus) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, corpus, batch_size=4, precision="fp32")
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert evaluate(model, corpus, batch_size=4, precision="fp32") == first


@pytest.mark.parametrize("training", [True, False])
def test_t09_evaluation_changes_nothing(recipe_of, moe_config, tiny_corpus, tokens, training):
    decoder = Decoder(recipe_of(moe_config(moe=AUX_FREE)))
    decoder.training_step(tokens, 0)
    counts = decoder.balancing.counts.clone()
    decoder.model.train(training)
    assert_evaluation_leaves_no_trace(decoder.model, tiny_corpus)
    assert torch.equal(decoder.balancing.counts, counts)
    assert decoder.model.training == decoder.model.blocks[0].training == training
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_t09_mistake(moe_config, build, tiny_corpus):
    def balance_in_forward(router, args, routing):
        router.expert_bias += 0.1 * (routing.counts.float().mean() - routing.counts).sign()

    model = build(moe_config(moe=AUX_FREE))
    for router in model.routers:
        router.register_forward_hook(balance_in_forward)
    with mistake:
        assert_evaluation_leaves_no_trace(model, tiny_corpus)


# T10: noise and jitter are for training; jitter scales what the router sees, not what experts see

NOISE = {"noisy_top_k": True, "router_jitter": 0.5}


@torch.no_grad()
def assert_evaluation_draws_nothing(model: GPT, tokens: torch.Tensor) -> None:
    model.eval()
    state = torch.get_rng_state()
    first = model(tokens)[0]
    assert torch.equal(model(tokens)[0], first)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def assert_experts_see_what_came_in(layer: MoE) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    given = x.clone()
    y, routing = layer.train()(x)
    expected = layer.experts(given.view(-1, 16), routing).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moe", [{}, *({name: value} for name, value in NOISE.items())], ids=str)
def test_t10_evaluation_draws_nothing(moe_config, build, tokens, moe):
    model = build(moe_config(moe=moe))
    assert_evaluation_draws_nothing(model, tokens)
    model.train()
    assert torch.equal(model(tokens)[0], model(tokens)[0]) == (not moe), "training does draw"


def test_t10_jitter_reaches_the_router_alone(moe_config, build):
    assert_experts_see_what_came_in(build(moe_config(moe=NOISE)).blocks[0].ffn)


def test_t10_mistakes(moe_config, build, tokens):
    class AlwaysNoisy(Router):
        def logits(self, x, past=None):
            self.training = True
            return super().logits(x, past)

    class JittersItsInput(MoE):
        def forward(self, x, tokens=None, past=None):
            return super().forward(x * torch.empty_like(x).uniform_(0.5, 1.5), tokens, past)

    for name, value in NOISE.items():
        model = build(moe_config(moe={name: value}))
        for router in model.routers:
            router.__class__ = AlwaysNoisy
        with mistake:
            assert_evaluation_draws_nothing(model, tokens)
    layer = build(moe_config()).blocks[0].ffn
    layer.__class__ = JittersItsInput
    with mistake:
        assert_experts_see_what_came_in(layer)


# T11: the reported validation loss is cross-entropy alone


def assert_reports_plain_cross_entropy(reported_ce, model: GPT, corpus) -> None:
    """Every token of the split once, in float64, one window at a time."""
    exact = copy.deepcopy(model).double()
    stream = [corpus.tokenizer.end_id, *corpus.val.tokens.tolist()]
    nats, context = 0.0, model.config.context
    for start in range(0, len(stream) - 1, context):
        window = stream[start : start + context + 1]
        with torch.no_grad():
            logits = exact(torch.tensor([window[:-1]]))[0][0].numpy()
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(row[target] for row, target in zip(logs, window[1:], strict=True))
    assert abs(reported_ce(model, corpus) - nats / len(corpus.val)) < 1e-5


def our_ce(model, corpus):
    return evaluate(model, corpus, batch_size=4, precision="fp32").overall.ce


@pytest.mark.parametrize("sparse", [True, False])
def test_t11_validation_reports_plain_cross_entropy(
    dense_config, moe_config, build, tiny_corpus, sparse
):
    config = moe_config(moe={"load_balancing_loss": 0.01}) if sparse else dense_config()
    assert_reports_plain_cross_entropy(our_ce, build(config), tiny_corpus)


def test_t11_mistake(moe_config, build, tiny_corpus):
    def with_balancing(model, corpus):
        routings = model(torch.zeros(1, 12, dtype=torch.int64))[1]
        terms = Balancing(model.config.moe).terms(routings, 1)
        return our_ce(model, corpus) + 0.01 * terms["load_balancing_loss"].sum()

    with mistake:
        assert_reports_plain_cross_entropy(with_balancing, build(moe_config()), tiny_corpus)


# T12: dropping over capacity sees the future and, over a whole batch, the other sequences

CROWDED = {"capacity_factor": 0.5}


@torch.no_grad()
def assert_past_ignores_the_future(model: GPT, tokens: torch.Tensor) -> None:
    before = model(tokens)[0]
    for start in (3, 6, 9):
        changed = tokens.clone()
        changed[:, start:] = (tokens[:, start:] + 7) % 264
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :start], before[:, :start], rtol=0, atol=1e-6)


@torch.no_grad()
def assert_a_sequence_ignores_its_neighbours(model: GPT, tokens: torch.Tensor) -> None:
    together = model(tokens)[0]
    for i in range(len(tokens)):
        alone = model(tokens[i : i + 1])[0][0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=2e-6)


@torch.no_grad()
def assert_drops_nothing(model: GPT, dropless: GPT, tokens: torch.Tensor) -> None:
    assert torch.equal(model(tokens)[0], dropless(tokens)[0])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_t12_evaluation_is_dropless(moe_config, build, tokens, top_k):
    moe = {"top_k": top_k, "d_expert": 16}
    dropless, model = build(moe_config(moe=moe)), build(moe_config(moe=moe | CROWDED))
    assert_drops_nothing(model.eval(), dropless, tokens)
    assert_past_ignores_the_future(model, tokens)
    assert_a_sequence_ignores_its_neighbours(model, tokens)
    with mistake:  # evaluation with training's capacity
        assert_drops_nothing(model.train(), dropless, tokens)


@pytest.mark.parametrize("top_k", [2, 3])
def test_t12_second_choices_wait_for_later_first_choices(moe_config, build, tokens, top_k):
    """So dropping is for training alone: even within one sequence it is not causal."""
    moe = {"top_k": top_k, "d_expert": 16, **CROWDED}
    with mistake:
        assert_past_ignores_the_future(build(moe_config(moe=moe)).train(), tokens)
    first_choices_only = build(moe_config(moe=moe | {"top_k": 1})).train()
    assert_past_ignores_the_future(first_choices_only, tokens)


def test_t12_capacity_is_per_sequence(moe_config, build, tokens, monkeypatch):
    model = build(moe_config(moe=CROWDED)).train()
    assert_a_sequence_ignores_its_neighbours(model, tokens)
    monkeypatch.setattr(
        "nano_moe.model.moe.drop_overflow",
        lambda routing, _, factor: drop_overflow(routing, 1, factor),
    )  # one queue for the batch
    with mistake:
        assert_a_sequence_ignores_its_neighbours(model, tokens)


# T13: an expert that chooses among all tokens chooses by the future


@pytest.mark.parametrize("training", [True, False])
def test_t13_tokens_choose_without_the_future(moe_config, build, tokens, training):
    model = build(moe_config()).train(training)
    assert model.config.is_causal
    assert_past_ignores_the_future(model, tokens)
    assert_a_sequence_ignores_its_neighbours(model, tokens)


@pytest.mark.parametrize("training", [True, False])
def test_t13_expert_choice_leaks(moe_config, build, tokens, training):
    model = build(moe_config(moe={"routing": "expert_choice"})).train(training)
    assert not model.config.is_causal
    with mistake:
        assert_past_ignores_the_future(model, tokens)
    with mistake:
        assert_a_sequence_ignores_its_neighbours(model, tokens)


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_t13_shuffled_futures_tell_the_leak(moe_config, build, routing):
    model = build(moe_config(moe={"routing": routing})).eval()
    drawn = torch.randint(0, 264, (4, 13), generator=torch.Generator().manual_seed(0))
    found = leak.losses(model, drawn[:, :-1], drawn[:, 1:], rows=4)
    leaks = found["ce_own_future"] != found["ce_other_future"]
    assert leaks == (routing == "expert_choice")


def test_t13_its_loss_enters_no_evaluation_and_no_study(moe_config, build, tiny_corpus, tmp_path):
    model = build(moe_config(moe={"routing": "expert_choice"}))
    with pytest.raises(UserError, match="sees the future"):
        evaluate(model, tiny_corpus, batch_size=4, precision="fp32")
    study = compared({"recipe": "schemes/expert-choice.yaml"}, {"recipe": "mixtral.yaml"})
    with pytest.raises(UserError, match="sees the future"):
        plan.plan(RECIPES / "study.yaml", study)


# T14: initialisation reaches stacked experts, with residual scaling


def assert_initializes_experts(init, config) -> None:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    init(model, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    residual = config.init_std / (2 * config.n_layers) ** 0.5
    for block in model.blocks:
        assert block.ffn.experts.gate_up.std().item() == pytest.approx(config.init_std, rel=0.1)
        assert block.ffn.experts.down.std().item() == pytest.approx(residual, rel=0.1)


def test_t14_init_reaches_experts(moe_config):
    assert_initializes_experts(init_weights, moe_config(n_layers=4))


def test_t14_mistakes(moe_config):
    def by_module_type(model, seed):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.2)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def without_residual_scale(model, seed):
        init_weights(model, seed)
        for block in model.blocks:
            nn.init.normal_(block.ffn.experts.down, std=0.2)

    for init in (by_module_type, without_residual_scale):
        with mistake:
            assert_initializes_experts(init, moe_config(n_layers=4))


# T15: routers have a learning rate of their own and no weight decay

OPTIM = {"lr": 0.02, "embedding_lr": 0.01, "router_lr": 0.005, "weight_decay": 0.1}


def assert_routers_are_a_group_of_their_own(groups, model: GPT) -> None:
    grouped_ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped_ids) == sorted(id(p) for p in model.parameters())
    routers = {id(router.weight) for router in model.routers}
    (group,) = [g for g in groups if routers & {id(p) for p in g["params"]}]
    assert {id(p) for p in group["params"]} == routers
    assert group["weight_decay"] == 0 and group["lr"] == 0.005


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("tie", [True, False])
def test_t15_routers_are_a_group_of_their_own(moe_config, build, name, tie):
    model = build(moe_config(moe={"n_shared_experts": 2, "d_expert": 8}, tie_embeddings=tie))
    groups = parameter_groups(model, OptimConfig(name=name, **OPTIM))
    assert_routers_are_a_group_of_their_own(groups, model)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        is_hidden = any(part in parameter_name for part in ("_proj", "experts.", "shared."))
        assert (id(parameter) in decayed) == is_hidden, parameter_name
    assert all(not group["muon"] for group in groups if group["name"] != "hidden")


def test_t15_omitted_rates_follow_the_next_one(moe_config, build):
    model = build(moe_config())
    for fields, rates in (
        ({"lr": 0.02}, {"hidden": 0.02, "router": 0.02, "embedding": 0.02}),
        ({"lr": 0.02, "embedding_lr": 0.01}, {"hidden": 0.02, "router": 0.01, "embedding": 0.01}),
    ):
        groups = parameter_groups(model, OptimConfig(**fields))
        assert {group["name"]: group["lr"] for group in groups} == rates


def test_t15_mistake(moe_config, build):
    model = build(moe_config())
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    by_dimension = [
        {"params": matrices, "lr": 0.005, "weight_decay": 0.1},
        {"params": vectors, "lr": 0.005, "weight_decay": 0.0},
    ]
    with mistake:
        assert_routers_are_a_group_of_their_own(by_dimension, model)


# T16: the selection bias selects and does nothing else; it is float32, centred, updated in place


def assert_bias_moves_selection_only(router: Router) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 16)
    before = router(x)
    router.expert_bias[3] = 5.0
    after = router(x)
    assert not (before.ids == 3).any(-1).all()
    assert (after.ids == 3).any(-1).all()
    chosen = after.logits.sigmoid().gather(-1, after.ids)
    weights = chosen / chosen.sum(-1, keepdim=True) if router.normalize else chosen
    torch.testing.assert_close(after.weights, weights)
    assert torch.equal(after.probs, before.probs)


def router_of(config, kind: type[Router] = Router) -> Router:
    router = kind(config)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


class FoldsBiasIntoGate(Router):
    def forward(self, x, tokens=None):
        logits = self.logits(x)
        scores = scores_of(logits, self.moe.score)
        chosen, ids = (scores + self.expert_bias).topk(self.moe.top_k)
        probs = probabilities_of(scores, self.moe.score)
        weights = gate_weights(chosen, self.normalize)
        return Routing(ids, weights, probs, logits, count_tokens(ids.flatten(), len(self.weight)))


@pytest.mark.parametrize("choice", [{}, {"normalize_top_k": False}, {"top_k": 1}], ids=str)
def test_t16_bias_moves_selection_only(moe_config, choice):
    config = moe_config(moe=AUX_FREE | {"d_expert": 8} | choice)
    assert_bias_moves_selection_only(router_of(config))
    with mistake:
        assert_bias_moves_selection_only(router_of(config, FoldsBiasIntoGate))


def assert_bias_keeps_small_steps(router: Router) -> None:
    """0.6 and a hundred steps of 0.001 are 0.7; in bf16 they stay near 0.6."""
    router.expert_bias.copy_(torch.tensor([0.6, -0.6]))
    router.bfloat16()
    for _ in range(100):
        router.expert_bias.copy_(
            updated_expert_bias(bias=router.expert_bias, counts=torch.tensor([0, 2]), rate=1e-3)
        )
    assert (router.expert_bias.float() - torch.tensor([0.7, -0.7])).abs().max() < 1e-4


def test_t16_bias_stays_float32(moe_config):
    class CastsItsBias(Router):
        _apply = nn.Module._apply

    config = moe_config(moe=AUX_FREE | {"n_experts": 2, "top_k": 1})
    assert_bias_keeps_small_steps(Router(config))
    with mistake:
        assert_bias_keeps_small_steps(CastsItsBias(config))


def assert_bias_does_not_drift(update) -> None:
    bias = torch.zeros(4)
    for _ in range(100):
        bias = update(bias=bias, counts=torch.tensor([9, 1, 1, 1]), rate=0.01)
    assert abs(bias.mean()) < 1e-5
    assert bias[0] < 0 < bias[1]


def test_t16_bias_is_centred():
    def uncentred(*, bias, counts, rate):
        return bias + rate * (counts.float().mean() - counts).sign()

    assert_bias_does_not_drift(updated_expert_bias)
    with mistake:
        assert_bias_does_not_drift(uncentred)


def assert_held_references_see_the_update(decoder: Decoder) -> None:
    (optimizer,), _ = decoder.configure_optimizers()
    held = decoder.state_dict()
    decoder.training_step(torch.full((2, 13), 1), 0)["loss"].backward()
    decoder.on_before_optimizer_step(optimizer)
    assert all(held[name].any() for name in held if "expert_bias" in name)


def test_t16_bias_is_updated_in_place(recipe_of, moe_config):
    class Rebinds(Decoder):
        def on_before_optimizer_step(self, optimizer):
            for router in self.model.routers:
                router.expert_bias = router.expert_bias.clone()
            super().on_before_optimizer_step(optimizer)

    recipe = recipe_of(moe_config(moe=AUX_FREE))
    assert_held_references_see_the_update(Decoder(recipe))
    with mistake:
        assert_held_references_see_the_update(Rebinds(recipe))


# T17: an expert of another group never wins, however low the biased scores


def assert_masked_experts_never_win(limit) -> None:
    scores = torch.rand(40, 8, generator=torch.Generator().manual_seed(0))
    for bias in (0.0, -0.5, -2.0):
        selection = scores + bias
        best = selection.view(-1, 4, 2).amax(-1).argmax(-1, keepdim=True)
        chosen = limit(selection, 4, 1, "max").topk(2).indices
        assert torch.equal(chosen // 2, best.expand(-1, 2))


def test_t17_masked_experts_never_win():
    def masked_by_zero(selection, *options):
        limited = limit_to_groups(selection, *options)
        return limited.masked_fill(limited.isinf(), 0.0)

    assert_masked_experts_never_win(limit_to_groups)
    with mistake:
        assert_masked_experts_never_win(masked_by_zero)


def test_t17_published_routers_with_a_bias_mask_by_infinity():
    """DeepSeek-V3 and GLM-4.5 have a bias; DeepSeek-V2 has none, and masks by 0.0 without harm."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "n_routed_experts": 8, "n_group": 4, "topk_group": 1}
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for family, model in (("DeepseekV3", "deepseek_v3"), ("Glm4Moe", "glm4_moe")):
        config = getattr(transformers, f"{family}Config")(num_experts_per_tok=2, **sizes)
        router = published_router(model, family, config)
        router.e_score_correction_bias.fill_(-3.0)
        chosen = router(x)[2]
        assert torch.equal(chosen[:, 0] // 2, chosen[:, 1] // 2), family
    config = transformers.DeepseekV2Config(
        num_experts_per_tok=3, topk_method="group_limited_greedy", **sizes
    )
    weights = published_router("deepseek_v2", "DeepseekV2", config)(x)[1]
    assert (weights.amin(-1) == 0).all(), "one choice more than a group holds shows the mask"


def published_router(model: str, family: str, config) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    router = getattr(module, f"{family}TopkRouter")(config)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


# T18: gates multiply what an expert gives, in float32


def assert_gates_scale_outputs(dispatch) -> None:
    torch.manual_seed(0)
    x, gates = torch.randn(6, 8), torch.rand(6, 1)
    ids = torch.tensor([[0], [1], [2], [0], [1], [2]])
    nothing = torch.empty(6, 3)
    ungated = Routing(ids, torch.ones(6, 1), nothing, nothing, count_tokens(ids.flatten(), 3))
    weights = torch.randn(3, 32, 8), torch.randn(3, 8, 16)
    for bf16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = dispatch(x, ungated._replace(weights=gates), *weights)
            whole = dispatch(x, ungated, *weights)
        torch.testing.assert_close(y, whole * gates, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dispatch", [loop, grouped])
def test_t18_gates_scale_outputs(dispatch):
    def gates_inputs(x, routing, gate_up, down):
        ungated = routing._replace(weights=torch.ones_like(routing.weights))
        return dispatch(x * routing.weights, ungated, gate_up, down)

    def bf16_gates(x, routing, gate_up, down):
        weights = routing.weights.bfloat16()
        return dispatch(x, routing._replace(weights=weights), gate_up, down)

    assert_gates_scale_outputs(dispatch)
    for wrong in (gates_inputs, bf16_gates):
        with mistake:
            assert_gates_scale_outputs(wrong)


# T19: a comparison is of what it says it is: sizes, tokens and routers counted


def compared(better: dict, than: dict, equal: tuple = ("tokens", "active", "total")) -> Study:
    """A study of two members, relative to the recipes' folder."""
    members = {"better": Member(**better), "than": Member(**than)}
    one = Comparison(says="s", better="better", than="than", equal=equal, smallest_effect=1.0)
    words = dict.fromkeys(("title", "question", "claim", "source"), "s")
    return Study(order=1, seeds=(1,), members=members, comparisons=(one,), **words)


def assert_fair(better: dict, than: dict, *equal: str) -> None:
    study = compared(better, than, equal)
    try:
        plan.check_fair(RECIPES, study, plan.plan(RECIPES / "study.yaml", study))
    except UserError as error:
        raise AssertionError from error


DENSE_384 = {"recipe": "dense.yaml", "fields": {"model.d_ff": 384}}


def test_t19_members_are_equal_in_what_the_comparison_says():
    top_2, fine = {"recipe": "mixtral.yaml"}, {"recipe": "deepseek.yaml"}
    assert_fair(fine, top_2, "tokens", "active", "total")
    assert_fair(top_2, DENSE_384, "tokens", "active", "flops")


@pytest.mark.parametrize(
    ("fields", "equal"),
    [
        ({"model.moe.d_expert": 256}, "active"),  # widths rounded up to a block
        ({"trainer.steps": 1000}, "tokens"),  # one side trained for longer
        ({"trainer.batch_size": 32}, "tokens"),
        (
            {"model.moe.n_shared_experts": 1, "model.moe.d_expert": 192},
            "active",
        ),  # a shared expert that was not counted
        ({"model.moe.n_experts": 64}, "flops"),  # routers that were not
        ({}, "total"),  # matched by what is active, and said to be matched in all
    ],
)
def test_t19_unequal_members_are_refused(fields, equal):
    with mistake:
        assert_fair({"recipe": "mixtral.yaml", "fields": fields}, DENSE_384, equal)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optim.warmup_steps", 200),  # another schedule
        ("optim.weight_decay", 0.5),
        ("trainer.precision", "bf16"),
        ("model.init_std", 0.02),
        ("data.bytes_per_domain", 100_000),  # other text
    ],
)
def test_t19_members_that_differ_in_what_is_not_compared_are_refused(field, value):
    with pytest.raises(AssertionError) as refused:
        assert_fair({"recipe": "mixtral.yaml", "fields": {field: value}}, DENSE_384, "active")
    assert f"differ in {field}; make it equal" in str(refused.value.__cause__)


# T20: no padding is counted as load


def assert_routes_only_real_tokens(score, model: GPT, corpus) -> None:
    routed: list[int] = []
    hooks = [
        router.register_forward_hook(lambda *call: routed.append(int(call[-1].counts.sum())))
        for router in model.routers
    ]
    score(model, corpus)
    for hook in hooks:
        hook.remove()
    assert sum(routed) == len(corpus.val) * model.config.moe.top_k * len(hooks)


def test_t20_evaluation_routes_only_real_tokens(moe_config, build, tiny_corpus):
    def padded(model, corpus):
        stream = torch.from_numpy(corpus.val.tokens.astype(np.int64))
        missing = -len(stream) % model.config.context
        stream = nn.functional.pad(stream, (0, missing), value=corpus.tokenizer.end_id)
        model(stream.view(-1, model.config.context))

    model = build(moe_config())
    assert_routes_only_real_tokens(our_ce, model, tiny_corpus)
    with mistake:
        assert_routes_only_real_tokens(padded, model, tiny_corpus)


def test_t20_reported_loads_are_those_of_real_tokens(moe_config, build, tiny_corpus):
    model, seen = build(moe_config()), []
    model.routers[1].register_forward_hook(lambda *call: seen.append(call[-1].counts))
    evaluation = evaluate(model, tiny_corpus, batch_size=4, precision="fp32")
    loads = torch.stack(seen).sum(0)
    row = evaluation.routing[1]
    assert evaluation.overall.tokens == len(tiny_corpus.val) == loads.sum() / 2
    assert row["load"] == pytest.approx((loads / loads.sum()).tolist())
    assert row["max_share"] == pytest.approx(max(row["load"]))


# T21: softmax, top-k, renormalize is top-k, softmax; without the last step outputs shrink


def assert_equals_softmax_of_the_chosen(routing: Routing) -> None:
    expected = routing.logits.gather(-1, routing.ids).softmax(-1)
    torch.testing.assert_close(routing.weights, expected)


def test_t21_normalized_weights_are_the_softmax_of_the_chosen(moe_config):
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    assert_equals_softmax_of_the_chosen(router_of(moe_config())(x))
    unnormalized = router_of(moe_config(moe={"normalize_top_k": False}))(x)
    with mistake:
        assert_equals_softmax_of_the_chosen(unnormalized)
    assert (unnormalized.weights.sum(-1) < 1).all()


def test_t21_unnormalized_weights_start_at_k_over_e(moe_config):
    router = router_of(moe_config(moe={"n_experts": 8, "normalize_top_k": False}))
    nn.init.zeros_(router.weight)
    torch.testing.assert_close(router(torch.randn(5, 16)).weights.sum(-1), torch.full((5,), 0.25))


# T22: exported weights mean the same there, and one expert is the dense FFN


def assert_exports_what_it_computes(model: GPT, tokens: torch.Tensor, family: str, export) -> None:
    theirs = model_of(family, model.config, experts_implementation="eager")
    fields, weights = export(family, model)
    for name, value in fields.items():
        for module in theirs.modules():
            if hasattr(module, name):
                setattr(module, name, value)
    theirs.load_state_dict(weights)
    with torch.no_grad():
        ours, found = model(tokens)[0], theirs(tokens).logits
    torch.testing.assert_close(ours, found, rtol=0, atol=1e-4)


def exported(family: str, model: GPT) -> tuple[dict, dict]:
    return {}, weights_of(family, model.config, model.state_dict())


def with_their_default(family, model):
    """Hugging Face does not divide the chosen weights by their sum unless the config says so."""
    return {"norm_topk_prob": False}, exported(family, model)[1]


def up_before_gate(family, model):
    weights = exported(family, model)[1]
    stacked = [name for name in weights if name.endswith("gate_up_proj")]
    return {}, weights | {
        name: weights[name].roll(weights[name].shape[1] // 2, 1) for name in stacked
    }


def halves_for_pairs(family, model):
    """Rotary pairs that lie a half apart, where the class turns neighbours."""
    order = interleaved(4, 4, 4).argsort(), interleaved(4, 4, 2).argsort()
    weights = dict(exported(family, model)[1])
    for name in weights:
        for part, back in zip(("q_proj", "k_proj"), order, strict=True):
            if part in name:
                weights[name] = weights[name][back]
    return {}, weights


def without_the_bias(family, model):
    weights = exported(family, model)[1]
    zeros = {n: torch.zeros_like(t) for n, t in weights.items() if "correction_bias" in n}
    assert zeros
    return {}, weights | zeros


@pytest.mark.parametrize(
    ("family", "fields", "moe", "fault"),
    [
        ("Qwen3Moe", {"qk_norm": True}, {}, with_their_default),
        ("Qwen3Moe", {"qk_norm": True}, {}, up_before_gate),
        ("Ernie4_5_Moe", {}, {"n_shared_experts": 1}, halves_for_pairs),
        ("Glm4Moe", {}, AUX_FREE, without_the_bias),
    ],
)
def test_t22_exported_weights_mean_the_same(moe_config, build, tokens, family, fields, moe, fault):
    config = moe_config(moe={"d_expert": 16} | moe, **fields)
    assert family_of(config) == family
    model = build(config).eval()
    for router in model.routers:
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.tensor([0.4, -0.4, 0.2, -0.2]))
    assert_exports_what_it_computes(model, tokens, family, exported)
    with mistake:
        assert_exports_what_it_computes(model, tokens, family, fault)


def assert_one_expert_is_the_dense_ffn(config, tolerance, **fields) -> None:
    moe = MoEConfig(**{"n_experts": 1, "top_k": 1, "d_expert": 32} | fields)
    layer = MoE(config.model_copy(update={"moe": moe}))
    dense = FFN(config.d_model, 32)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        dense.gate_up.weight.copy_(layer.experts.gate_up[0])
        dense.down.weight.copy_(layer.experts.down[0])
        x = torch.randn(3, 7, config.d_model)
        torch.testing.assert_close(layer(x)[0], dense(x)[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend, tolerance", [("fused", 0), ("loop", 1e-5), ("grouped", 1e-5)])
def test_t22_one_expert_is_the_dense_ffn(dense_config, backend, tolerance):
    """Bit for bit where both take the same kernels, else but for rounding."""
    check = partial(assert_one_expert_is_the_dense_ffn, dense_config(), tolerance, backend=backend)
    check()
    with mistake:  # a sigmoid of one score is below 1 unless it is divided by itself
        check(score="sigmoid")


# T23: a saved model routes as before; the combine adds in a fixed order


def assert_resumes_with_its_routing(model: GPT, fresh: GPT, tokens: torch.Tensor) -> None:
    for router in model.routers:
        router.expert_bias.copy_(torch.tensor([2.0, -2.0, 1.0, -1.0]))
    fresh.load_state_dict(model.state_dict())
    logits, routings = model(tokens)
    resumed, resumed_routings = fresh(tokens)
    for routing, other in zip(routings, resumed_routings, strict=True):
        assert torch.equal(routing.ids, other.ids)
    assert torch.equal(logits, resumed)


def test_t23_state_dict_holds_the_bias(moe_config, build, tokens):
    config = moe_config(moe=AUX_FREE)
    assert_resumes_with_its_routing(build(config, 0), build(config, 1), tokens)
    forgets = [build(config, 0), build(config, 1)]
    for model in forgets:
        for router in model.routers:
            router.register_buffer("expert_bias", router.expert_bias, persistent=False)
    with mistake:
        assert_resumes_with_its_routing(*forgets, tokens)


def assert_combine_is_deterministic(dispatch) -> None:
    torch.manual_seed(0)
    routing = routing_from(torch.randn(50, 6), top_k=5)
    x, weights = torch.randn(50, 8), (torch.randn(6, 32, 8), torch.randn(6, 8, 16))
    first = dispatch(x, routing, *weights)
    assert all(torch.equal(dispatch(x, routing, *weights), first) for _ in range(5))


def test_t23_combine_is_deterministic():
    def in_any_order(x, routing, gate_up, down):
        order = torch.randperm(len(gate_up))
        ids = order.argsort()[routing.ids]
        return loop(x, routing._replace(ids=ids), gate_up[order], down[order])

    assert_combine_is_deterministic(grouped)
    assert_combine_is_deterministic(loop)
    with mistake:
        assert_combine_is_deterministic(in_any_order)


# T23, once more: where the data stood and the random state belong in a checkpoint


def assert_goes_on_with_the_next_batch(data_type, recipe, corpus) -> None:
    whole = iter(data_type(corpus, recipe).train_dataloader())
    batches = [next(whole) for _ in range(4)]
    stopped, resumed = data_type(corpus, recipe), data_type(corpus, recipe)
    stopped.trainer = SimpleNamespace(global_step=3)
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(next(iter(resumed.train_dataloader())), batches[3])


def assert_random_state_returns(decoder_type, recipe) -> None:
    decoder, checkpoint = decoder_type(recipe), {}
    torch.manual_seed(5)
    decoder.on_save_checkpoint(checkpoint)
    drawn = torch.rand(3)
    decoder.on_load_checkpoint(checkpoint)
    assert torch.equal(torch.rand(3), drawn)


def test_t23_data_and_random_state_go_on(recipe_of, dense_config, tiny_corpus):
    recipe = recipe_of(dense_config())
    assert_goes_on_with_the_next_batch(TokenData, recipe, tiny_corpus)
    assert_random_state_returns(Decoder, recipe)


def test_t23_mistakes_of_forgetting(recipe_of, dense_config, tiny_corpus):
    class ForgetsItsPlace(TokenData):
        def state_dict(self):
            return {"consumed": 0}

    class ForgetsItsDraws(Decoder):
        def on_load_checkpoint(self, checkpoint):
            pass

    recipe = recipe_of(dense_config())
    with mistake:
        assert_goes_on_with_the_next_batch(ForgetsItsPlace, recipe, tiny_corpus)
    with mistake:
        assert_random_state_returns(ForgetsItsDraws, recipe)


# T24: an expert without tokens must have a gradient, of zeros: data parallelism waits for it


@pytest.fixture
def process_group():
    """Of this process alone."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_trains_on_with_idle_experts(layer: nn.Module) -> None:
    """Under DDP, which refuses a second step where the first left a parameter without gradient."""
    wrapped = nn.parallel.DistributedDataParallel(layer)
    for seed in range(2):
        x = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(seed))
        try:
            y, routing = wrapped(x)
        except RuntimeError as error:
            raise AssertionError("the reducer still waits") from error
        assert (routing.counts == 0).any()
        y.sum().square().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["loop", "grouped", "fused"])
def test_t24_idle_experts_do_not_stop_data_parallelism(process_group, moe_config, backend):
    torch.manual_seed(0)
    layer = MoE(moe_config(moe={"n_experts": 8, "backend": backend, "d_expert": 16}))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert_trains_on_with_idle_experts(layer)


class SkipsIdleExperts(nn.Module):
    """One module per expert, called for its tokens alone."""

    def __init__(self, whole: Experts):
        super().__init__()
        self.each = nn.ModuleList(FFN(16, 16) for _ in whole.down)

    def forward(self, x, routing):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.each):
            token, slot = (routing.ids == number).nonzero(as_tuple=True)
            if len(token) == 0:
                continue
            y = y.index_add(0, token, expert(x[token])[0] * routing.weights[token, slot, None])
        return y


def test_t24_mistake(process_group, moe_config):
    torch.manual_seed(0)
    layer = MoE(moe_config(moe={"n_experts": 8, "d_expert": 16}))
    nn.init.normal_(layer.router.weight)
    layer.experts = SkipsIdleExperts(layer.experts)
    with mistake:
        assert_trains_on_with_idle_experts(layer)


# T25: an expert without tokens is left alone


def assert_idle_expert_rests(experts: Experts, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter in experts.parameters():
        parameter.grad = torch.randn_like(parameter)
        parameter.grad[1] = 0
    held = [
        tensor
        for parameter in experts.parameters()
        for tensor in (parameter.data, *optimizer.state[parameter].values())
        if torch.is_tensor(tensor) and tensor.ndim == 3
    ]
    assert len(held) >= 4, "weights and at least one moment each"
    before = [tensor.clone() for tensor in held]
    optimizer.step()
    for now, then in zip(held, before, strict=True):
        assert torch.equal(now[1], then[1])
        assert not torch.equal(now[0], then[0]) and not torch.equal(now[2], then[2])


def ours(experts: Experts, name: str) -> MuonAdamW:
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.1)
    layer = nn.ModuleDict({"layer": nn.ModuleDict({"ffn": experts})})
    return MuonAdamW(parameter_groups(layer, config), config)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_t25_idle_experts_rest(name, monkeypatch):
    experts = Experts(3, 8, 8, "loop")
    assert_idle_expert_rests(experts, ours(experts, name))
    monkeypatch.setattr(elementwise, "nonzero", lambda grad: grad.new_ones(len(grad)))
    with mistake:
        assert_idle_expert_rests(experts, ours(experts, name))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_t25_mistake(weight_decay):
    experts = Experts(3, 8, 8, "loop")
    adamw = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=weight_decay)
    with mistake:
        assert_idle_expert_rests(experts, adamw)


# T26: alarms look at the busiest expert of each layer, not at the mean loss


def assert_alarm_rings(rings) -> None:
    """Eight layers of eight experts: seven even, in one expert 0 takes 73% with mild scores."""
    counts = torch.full((8, 8), 100)
    counts[3] = torch.tensor([584, 36, 30, 30, 30, 30, 30, 30])
    probs = torch.full((8, 800, 8), 1 / 8)
    probs[3, :, 0] += 0.1
    probs[3, :, 1:] -= 0.1 / 7
    assert rings(counts, probs)
    assert not rings(torch.full((8, 8), 100), torch.full((8, 800, 8), 1 / 8))


def mean_loss(counts, probs):
    layers = zip(counts, probs, strict=True)
    return torch.stack([load_balancing_loss(counts=c, probs=p) for c, p in layers]).mean()


def test_t26_the_largest_share_shows_what_the_mean_loss_hides():
    assert_alarm_rings(lambda counts, _: load_statistics(counts)["max_share"].max() > 0.6)
    with mistake:
        assert_alarm_rings(lambda counts, probs: mean_loss(counts, probs) > 1.2)
