"""The whole decoder: causality, independence of batch rows, precision, layer pattern, loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nano_moe.config import FieldFault, MLAConfig, ModelConfig
from nano_moe.model.balance import load_balancing_loss, router_z_loss
from nano_moe.model.ffn import FFN
from nano_moe.model.loss import cross_entropy
from nano_moe.model.moe import MoE

LATENT = {
    "mla": MLAConfig(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=8),
    "n_kv_heads": None,
}
KINDS = {
    "dense": None,
    "top-2": {},  # grouped in float32, the loop in float64
    "loop": {"backend": "loop"},
    "top-1 sigmoid": {"top_k": 1, "score": "sigmoid", "d_expert": 16},
    "shared and bias": {"n_shared_experts": 2, "score": "sigmoid", "bias_update_rate": 0.1},
    "gated and scaled": {
        "n_shared_experts": 2, "shared_expert_gate": True, "per_expert_scale": True,
        "routed_scaling_factor": 2.5,
    },
    "groups": {"n_experts": 8, "n_groups": 4, "top_k_groups": 2, "group_score": "top2_sum"},
    "window": {"router_window": 3},
    "hash": {"routing": "hash"},
    "latent": LATENT,
    "gelu": {"activation": "gelu"},
    "noise and jitter": {"noisy_top_k": True, "router_jitter": 0.3},
    "capacity": {"capacity_factor": 0.5},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request, dense_config, moe_config, build):
    moe = KINDS[request.param]
    if moe is None:
        return build(dense_config()).eval()
    of_model = {key: moe[key] for key in moe.keys() & ModelConfig.model_fields.keys()}
    of_moe = {key: moe[key] for key in moe.keys() - of_model.keys()}
    return build(moe_config(moe=of_moe, **of_model)).eval()


@torch.no_grad()
def test_later_tokens_never_change_earlier_logits(model, tokens):
    before = model(tokens)[0]
    for start in (1, 5, 11):
        changed = tokens.clone()
        changed[:, start:] = (tokens[:, start:] + 7) % 264
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :start], before[:, :start], rtol=0, atol=1e-6)
        assert (after[:, start:] - before[:, start:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_earlier_tokens_do_change_later_logits(model, tokens):
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 7) % 264
    difference = (model(changed)[0] - model(tokens)[0]).abs().amax(-1)
    assert difference.min() > 1e-5, "every later position sees the first token"


@torch.no_grad()
def test_a_sequence_alone_gives_its_logits_in_a_batch(model):
    batch = torch.randint(0, 264, (5, 12), generator=torch.Generator().manual_seed(1))
    together = model(batch)[0]
    for i in range(5):
        alone = model(batch[i : i + 1])[0][0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_shorter_sequence_gives_the_first_logits(model, tokens):
    whole = model(tokens)[0]
    for length in (1, 7):
        torch.testing.assert_close(
            model(tokens[:, :length])[0], whole[:, :length], rtol=0, atol=2e-6
        )


def test_more_tokens_than_the_context_are_refused(model):
    with pytest.raises(ValueError, match="13 tokens are more than context=12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


class NarrowFloats(TorchDispatchMode):
    """Collects every operation that gives a floating tensor narrower than float64."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            narrow = torch.is_tensor(one) and one.is_floating_point()
            if narrow and one.dtype != torch.float64:
                self.seen.add(str(func))
        return out


def test_a_float64_model_computes_in_float64_throughout(model, tokens):
    single = model(tokens)[0]
    model.double()
    with NarrowFloats() as narrow:
        logits, routings = model(tokens)
        loss = cross_entropy(logits, tokens)
        for routing in filter(None, routings):
            loss = loss + load_balancing_loss(counts=routing.counts, probs=routing.probs)
            loss = loss + router_z_loss(logits=routing.logits)
        loss.backward()
    assert not narrow.seen
    assert logits.dtype == loss.dtype == torch.float64
    torch.testing.assert_close(single.double(), logits, rtol=0, atol=1e-4)


def test_bf16_autocast_leaves_routing_and_losses_in_float32(moe_config, build, tokens):
    model = build(moe_config(moe={"n_shared_experts": 1, "d_expert": 16}))
    exact = model(tokens)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routings = model(tokens)
        losses = [
            cross_entropy(logits, tokens),
            *(load_balancing_loss(counts=r.counts, probs=r.probs) for r in routings),
            *(router_z_loss(logits=r.logits) for r in routings),
        ]
    assert logits.dtype == torch.bfloat16, "the big products do run in bf16"
    for routing in routings:
        floats = (routing.weights, routing.probs, routing.logits)
        assert [one.dtype for one in floats] == [torch.float32] * 3
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert (logits - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("first_k_dense", "every_n_layers", "sparse"),
    [(0, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [2, 3, 4, 5]), (0, 2, [1, 3, 5]), (3, 2, [3, 5]),
     (0, 3, [2, 5]), (0, 6, [5])],
)  # fmt: skip
def test_sparse_layers_lie_where_the_recipe_says(
    moe_config, build, tokens, first_k_dense, every_n_layers, sparse
):
    moe = {"first_k_dense": first_k_dense, "every_n_layers": every_n_layers}
    model = build(moe_config(moe=moe, n_layers=6))
    kinds = [type(block.ffn) for block in model.blocks]
    assert [i for i, kind in enumerate(kinds) if kind is MoE] == sparse
    assert kinds.count(FFN) == 6 - len(sparse)
    assert [i for i, r in enumerate(model(tokens)[1]) if r is not None] == sparse
    routers = [model.blocks[i].ffn.router for i in sparse]
    assert all(a is b for a, b in zip(model.routers, routers, strict=True))


def test_a_pattern_without_a_sparse_layer_is_refused(moe_config):
    with pytest.raises(ValueError, match="none of n_layers=2 sparse") as caught:
        moe_config(moe={"first_k_dense": 2})
    fault = caught.value.errors()[0]["ctx"]["error"]
    assert isinstance(fault, FieldFault) and fault.field == "moe.first_k_dense"


def test_cross_entropy_equals_log_sum_exp_less_the_target():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    each = cross_entropy(logits, targets, reduction="none")
    expected = []
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        total = math.log(sum(math.exp(z) for z in row))
        expected.append(total - row[target])
    assert each.tolist() == pytest.approx(expected, abs=1e-5)
    assert cross_entropy(logits, targets).item() == pytest.approx(sum(expected) / 8, abs=1e-5)


def test_cross_entropy_of_bf16_logits_is_computed_in_float32():
    torch.manual_seed(0)
    logits, targets = (torch.randn(1, 64, 500) * 4).bfloat16(), torch.randint(0, 500, (1, 64))
    exact = cross_entropy(logits.double(), targets)
    assert exact.dtype == torch.float64
    assert abs(cross_entropy(logits, targets) - exact) < 1e-5


def test_tied_embeddings_are_one_tensor_and_untied_are_two(dense_config, build, tokens):
    tied, untied = build(dense_config()), build(dense_config(tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
        assert torch.equal(untied(tokens)[0], tied(tokens)[0])
