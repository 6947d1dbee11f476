"""Balancing over micro-batches, sequences, whole steps and ranks, against brute force.

Shapes: B sequences, T time, K top_k, E experts.
"""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from nano_moe import ranks
from nano_moe.config import MoEConfig
from nano_moe.model.routing import Routing, count_tokens
from nano_moe.training.balancing import Balancing
from nano_moe.training.module import Decoder

E = 4
LOSS = "load_balancing_loss"


def routing_of(logits: torch.Tensor, top_k: int) -> Routing:
    """A softmax routing of (N, E) logits."""
    probs = logits.softmax(-1)
    weights, ids = probs.topk(top_k)
    return Routing(ids, weights, probs, logits, count_tokens(ids.flatten(), logits.shape[-1]))


def by_hand(ids: torch.Tensor, probs: torch.Tensor, taken: torch.Tensor) -> float:
    """E * sum_i f_i P_i in plain Python; loads from `taken` ids, probabilities from `probs`."""
    chosen = taken.flatten().tolist()
    loads = [chosen.count(e) / len(chosen) for e in range(E)]
    means = [sum(row[e] for row in probs.tolist()) / len(probs) for e in range(E)]
    return E * sum(f * p for f, p in zip(loads, means, strict=True))


def specialised(experts: list[int], tokens: int = 64) -> Routing:
    """Equal parts of the tokens all but certain of one expert each, top-1."""
    logits = torch.cat([20 * torch.eye(E)[[e] * (tokens // len(experts))] for e in experts])
    return routing_of(logits, top_k=1)


def balancing(**moe) -> Balancing:
    return Balancing(MoEConfig(n_experts=E, **{"top_k": 2, **moe}))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_each_scope_is_its_brute_force(top_k):
    torch.manual_seed(0)
    sequences, length = 3, 5
    micro_batches = [
        [routing_of(2 * torch.randn(sequences * length, E), top_k) for _ in range(2)]  # 2 layers
        for _ in range(2)
    ]
    scopes = ("micro_batch", "sequence", "global_batch")
    made = {scope: balancing(top_k=top_k, balance_scope=scope) for scope in scopes}
    for micro_batch in range(2):
        layers = micro_batches[micro_batch]
        found = {scope: b.terms(layers, sequences)[LOSS] for scope, b in made.items()}
        for layer, routing in enumerate(layers):
            so_far = [micro_batches[m][layer].ids for m in range(micro_batch + 1)]
            parts = [slice(s * length, (s + 1) * length) for s in range(sequences)]
            expected = {
                "micro_batch": by_hand(routing.ids, routing.probs, routing.ids),
                "global_batch": by_hand(routing.ids, routing.probs, torch.cat(so_far)),
                "sequence": sum(
                    by_hand(routing.ids[p], routing.probs[p], routing.ids[p]) for p in parts
                )
                / sequences,
            }
            for scope, value in expected.items():
                assert found[scope][layer].item() == pytest.approx(value, rel=1e-5), scope


def test_specialised_parts_are_balanced_for_a_wide_enough_scope():
    """One expert per sequence: the sequences are unbalanced, the micro-batch is balanced."""
    per_sequence = specialised([0, 1, 2, 3])
    values = {s: balancing(top_k=1, balance_scope=s) for s in ("micro_batch", "sequence")}
    terms = {s: b.terms([per_sequence], 4)[LOSS].item() for s, b in values.items()}
    assert terms["micro_batch"] == pytest.approx(1, abs=1e-5)
    assert terms["sequence"] == pytest.approx(4, abs=1e-5)


def test_specialised_micro_batches_are_balanced_over_the_step_alone():
    micro, whole = (balancing(top_k=1, balance_scope=s) for s in ("micro_batch", "global_batch"))
    for expert in range(E):
        micro_value = micro.terms([specialised([expert])], 1)[LOSS].item()
        value = whole.terms([specialised([expert])], 1)[LOSS].item()
        assert micro_value == pytest.approx(4, abs=1e-5)
        assert value == pytest.approx(4 / (expert + 1), abs=1e-5)  # towards 1 at the step's end
    whole.step([])
    assert whole.terms([specialised([0])], 1)[LOSS].item() == pytest.approx(4, abs=1e-5)


def test_terms_enter_the_loss_by_their_coefficients_and_in_any_combination():
    layers = [specialised([0, 1]), specialised([2])]
    for coefficients in ({}, {LOSS: 0.5}, {"router_z_loss": 0.1}, {LOSS: 2.0, "router_z_loss": 3}):
        made = balancing(top_k=1, **coefficients)
        terms = made.terms(layers, 1)
        weighted = made.weighted(terms)
        assert weighted.keys() == coefficients.keys()
        for name, coefficient in coefficients.items():
            by_layer = [coefficient * value for value in terms[name].tolist()]
            assert weighted[name].item() == pytest.approx(sum(by_layer))


def test_no_scope_sends_a_gradient_through_counts():
    logits = torch.randn(12, E, requires_grad=True)
    for scope in ("micro_batch", "sequence", "global_batch"):
        made = balancing(balance_scope=scope)
        routing = routing_of(logits, 2)
        (found,) = torch.autograd.grad(made.terms([routing], 3)[LOSS].sum(), logits)
        shares = count_tokens(routing.ids.view(3, -1) if scope == "sequence" else
                              routing.ids.view(1, -1), E).double()  # fmt: skip
        shares = shares / shares.sum(-1, keepdim=True)
        by_token = shares.repeat_interleave(12 // len(shares), 0).float()
        loss = E * (by_token * logits.softmax(-1)).sum() / 12
        torch.testing.assert_close(found, torch.autograd.grad(loss, logits)[0])


class Biased:
    """What a step needs of a router."""

    def __init__(self) -> None:
        self.expert_bias = torch.zeros(E)


@pytest.mark.parametrize("rule", ["sign", "error"])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_a_step_moves_each_bias_by_the_whole_steps_load(rule, scope):
    moe = {"score": "sigmoid", "bias_update_rate": 0.1, "bias_rule": rule, "top_k": 1}
    made, router = balancing(balance_scope=scope, **moe), Biased()
    for experts in ([0], [0, 1], [2]):
        made.terms([specialised(experts)], 1)
    made.step([router])
    load, mean = torch.tensor([96.0, 32.0, 64.0, 0.0]), 48.0
    error = (mean - load) / mean
    expected = 0.1 * (error.sign() if rule == "sign" else error)
    torch.testing.assert_close(router.expert_bias, expected - expected.mean())
    made.step([router])  # nothing was seen since
    torch.testing.assert_close(router.expert_bias, expected - expected.mean())


def on_rank(rank: int, rendezvous: str, folder: str) -> None:
    """One of two processes; rank r sees tokens of expert r alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    moe = {"score": "sigmoid", "bias_update_rate": 0.1, "top_k": 1}
    found = {}
    for scope in ("micro_batch", "global_batch"):
        made, router = balancing(balance_scope=scope, **moe), Biased()
        found[scope] = made.terms([specialised([rank])], 1)[LOSS].item()
        made.step([router])
        found[f"{scope} bias"] = router.expert_bias
    own = torch.tensor([rank + 1])
    found["sum"] = ranks.total(own)
    assert own.item() == rank + 1
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_balance_together(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["sum"].item() == 3
        assert found["micro_batch"] == pytest.approx(2, abs=1e-5)  # it is that of both ranks
        assert found["global_batch"] == pytest.approx(2, abs=1e-5)
        for scope in ("micro_batch", "global_batch"):
            expected = torch.tensor([-0.1, -0.1, 0.1, 0.1])
            torch.testing.assert_close(found[f"{scope} bias"], expected)


def test_one_process_counts_alone():
    counts = torch.tensor([1, 2])
    assert ranks.total(counts) is counts


def test_an_optimizer_step_over_micro_batches_is_balanced_as_a_whole(workshop):
    """Whole-step balance of a real training: the last micro-batch's term is the whole step's."""
    changes = {"trainer__steps": 1, "trainer__batch_size": 1, "trainer__accumulate": 4}
    outputs = []
    moe = {"n_experts": 4, "top_k": 1, "balance_scope": "global_batch", LOSS: 0.01}
    original = Decoder.training_step

    def training_step(module, batch, batch_idx):
        logits, routings = module.model(batch[:, :-1])
        outputs.append((original(module, batch, batch_idx), [r.probs.detach() for r in routings]))
        return outputs[-1][0]

    workshop.monkeypatch.setattr(Decoder, "training_step", training_step)
    workshop.train(workshop.recipe("softmax", model__moe=moe, **changes))
    counts = sum(output["counts"] for output, _ in outputs).double()
    last, probs = outputs[-1]
    for layer in range(2):
        share = counts[layer] / counts[layer].sum()
        expected = 4 * (share * probs[layer].double().mean(0)).sum()
        assert last[LOSS][layer].item() == pytest.approx(expected.item(), rel=1e-5)
