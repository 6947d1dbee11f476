"""Dispatch backends: `grouped` gives what `loop` gives, forward and backward, whoever gets tokens.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.model.experts import Experts, grouped, loop
from nano_moe.model.routing import Routing


def choose(crowding: str, n_tokens: int, n_experts: int, top_k: int) -> torch.Tensor:
    """(N, K) distinct experts per token: at random, all the same ones, or never the first."""
    scores = torch.rand(n_tokens, n_experts)
    if crowding == "one crowd":
        scores = scores[:1].expand(n_tokens, -1)
    if crowding == "first idle" and top_k < n_experts:
        scores[:, 0] = -1
    return scores.topk(top_k, dim=-1).indices


def routing_of(ids: torch.Tensor, weights: torch.Tensor, n_experts: int) -> Routing:
    counts = torch.bincount(ids.flatten(), minlength=n_experts)
    nothing = torch.empty(len(ids), n_experts)
    return Routing(ids, weights, nothing, nothing, counts)


def run(dispatch, x, ids, weights, gate_up, down):
    """Output and the gradients of x, weights, gate_up and down, for one fixed output gradient."""
    leaves = [one.detach().clone().requires_grad_() for one in (x, weights, gate_up, down)]
    y = dispatch(leaves[0], routing_of(ids, leaves[1], len(gate_up)), *leaves[2:])
    direction = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * direction.to(y.dtype)).sum(), leaves)]


def distance(values, references) -> float:
    """Largest distance of an output or gradient to its reference, over the reference's size.

    A weight's gradient is an inner product that may cancel: its size is that of the output.
    """
    y, _, of_weights, *_ = references
    sizes = [one.norm() for one in references]
    sizes[2] = max(of_weights.norm(), y.norm())
    pairs = zip(values, references, sizes, strict=True)
    return max(float((v.double() - r).norm() / size.clamp_min(1e-9)) for v, r, size in pairs)


EXPERTS_AND_TOP_K = st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e)))
PROBLEMS = st.tuples(
    EXPERTS_AND_TOP_K,
    st.integers(1, 20),  # tokens
    st.sampled_from((8, 16, 24)),  # D
    st.sampled_from((8, 16, 24)),  # F
    st.sampled_from(("random", "one crowd", "first idle")),
    st.integers(0, 999),  # seed
)


def tensors(problem):
    """x, ids, weights, gate_up, down in float32."""
    (n_experts, top_k), n_tokens, width, hidden, crowding, seed = problem
    torch.manual_seed(seed)
    ids = choose(crowding, n_tokens, n_experts, top_k)
    gate_up = torch.randn(n_experts, 2 * hidden, width) / width**0.5
    down = torch.randn(n_experts, width, hidden) / hidden**0.5
    return torch.randn(n_tokens, width), ids, torch.rand(n_tokens, top_k) + 0.1, gate_up, down


def exact(made):
    """The float64 loop's output and gradients."""
    return run(loop, *(one.double() if one.is_floating_point() else one for one in made))


@given(PROBLEMS)
def test_both_backends_equal_the_float64_loop(problem):
    made = tensors(problem)
    assert distance(run(loop, *made), exact(made)) < 2e-6
    assert distance(run(grouped, *made), exact(made)) < 2e-6


@given(PROBLEMS)
def test_bf16_autocast_of_both_backends_stays_near_float64(problem):
    made = tensors(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_loop, by_group = run(loop, *made), run(grouped, *made)
    assert all(one.dtype == torch.float32 for one in (*by_loop, *by_group))
    assert distance(by_loop, exact(made)) < 0.05
    assert distance(by_group, exact(made)) < 0.05


@given(PROBLEMS)
def test_bf16_tensors_stay_bf16_and_near_float64(problem):
    x, ids, weights, gate_up, down = made = tensors(problem)
    for dispatch in (loop, grouped):
        values = run(dispatch, x.bfloat16(), ids, weights, gate_up.bfloat16(), down.bfloat16())
        assert [one.dtype for one in values] == [
            torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16
        ]  # fmt: skip
        assert distance(values, exact(made)) < 0.05


@pytest.mark.parametrize("dispatch", [loop, grouped])
def test_idle_experts_change_nothing_and_get_zero_gradients(dispatch):
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(5, 8), torch.randn(4, 32, 8), torch.randn(4, 8, 16)
    ids, weights = torch.full((5, 1), 2), torch.rand(5, 1)
    with_idle = run(dispatch, x, ids, weights, gate_up, down)
    alone = run(dispatch, x, torch.zeros_like(ids), weights, gate_up[2:3], down[2:3])
    for all_four, only_one in zip(with_idle[:3], alone[:3], strict=True):
        torch.testing.assert_close(all_four, only_one)
    for all_four, only_one in zip(with_idle[3:], alone[3:], strict=True):
        torch.testing.assert_close(all_four[2:3], only_one)
        assert not all_four[[0, 1, 3]].any()


@pytest.mark.parametrize("dispatch", [loop, grouped])
def test_no_tokens_give_no_rows(dispatch):
    routing = routing_of(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 4)
    y = dispatch(torch.empty(0, 8), routing, torch.randn(4, 32, 8), torch.randn(4, 8, 16))
    assert y.shape == (0, 8)


@pytest.mark.parametrize("dispatch", [loop, grouped])
@pytest.mark.parametrize("top_k", [1, 3])
def test_swapping_tokens_swaps_rows_and_nothing_else(dispatch, top_k):
    torch.manual_seed(1)
    x, gate_up, down = torch.randn(9, 8), torch.randn(4, 32, 8), torch.randn(4, 8, 16)
    ids, weights = choose("random", 9, 4, top_k), torch.rand(9, top_k)
    order = torch.randperm(9)
    y = dispatch(x, routing_of(ids, weights, 4), gate_up, down)
    swapped = dispatch(x[order], routing_of(ids[order], weights[order], 4), gate_up, down)
    torch.testing.assert_close(swapped, y[order])


@pytest.mark.parametrize(
    ("width", "dtype", "autocast"),
    [(10, torch.float32, False), (16, torch.float64, False), (12, torch.float32, True)],
)
def test_auto_runs_where_grouped_products_cannot(width, dtype, autocast):
    torch.manual_seed(2)
    auto = Experts(3, width, 8, "auto").to(dtype)
    for parameter in auto.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, width, dtype=dtype)
    routing = routing_of(choose("random", 7, 3, 2), torch.rand(7, 2, dtype=dtype), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(auto(x, routing), loop(x, routing, auto.gate_up, auto.down))


def test_a_named_backend_is_the_one_that_runs(monkeypatch):
    ran = []
    for name in ("loop", "grouped"):
        monkeypatch.setattr(
            f"nano_moe.model.experts.{name}", lambda x, *_, name=name: ran.append(name) or x
        )
    routing = routing_of(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 1)
    for backend in ("loop", "grouped", "auto"):
        Experts(1, 8, 8, backend)(torch.randn(2, 8), routing)
    assert ran == ["loop", "grouped", "grouped"]
