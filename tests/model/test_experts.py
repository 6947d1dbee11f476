"""Dispatch backends: both give what a brute force gives, forward and backward, whoever gets tokens.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_moe.model.experts import DISPATCH, Experts, grouped, loop
from nano_moe.model.fused import fused, plan
from nano_moe.model.ops import ACTIVATIONS
from nano_moe.model.routing import Routing, best_experts


class Problem(NamedTuple):
    """One dispatch: what goes in, and which assignments are carried out."""

    x: Tensor  # (N, D)
    ids: Tensor  # (N, K)
    weights: Tensor  # (N, K)
    first: Tensor  # (E, 2F or F, D)
    down: Tensor  # (E, D, F)
    kept: Tensor | None = None  # (N, K)
    activation: str = "swiglu"

    def to(self, dtype: torch.dtype) -> Problem:
        """Everything but the routing weights in another dtype; they go along to float64 only."""
        weights = self.weights.double() if dtype == torch.float64 else self.weights
        cast = {name: getattr(self, name).to(dtype) for name in ("x", "first", "down")}
        return self._replace(weights=weights, **cast)


def routing_of(ids: Tensor, weights: Tensor, n_experts: int, kept: Tensor | None = None) -> Routing:
    counts = torch.bincount(ids.flatten(), minlength=n_experts)
    nothing = torch.empty(len(ids), n_experts)
    return Routing(ids, weights, nothing, nothing, counts, kept)


def choose(crowding: str, n_tokens: int, n_experts: int, top_k: int) -> Tensor:
    """(N, K) distinct experts per token: at random, all the same ones, or never the first."""
    scores = torch.rand(n_tokens, n_experts)
    if crowding == "one crowd":
        scores = scores[:1].expand(n_tokens, -1)
    if crowding == "first idle" and top_k < n_experts:
        scores[:, 0] = -1
    return scores.topk(top_k, dim=-1).indices


def keep(share: str, like: Tensor) -> Tensor | None:
    """(N, K) which assignments to carry out; under "some", nothing of the first token."""
    if share == "all":
        return None
    kept = torch.rand(like.shape) < (0.6 if share == "some" else 0)
    kept[:1] = False
    return kept


@st.composite
def problems(draw) -> Problem:
    """Any sizes, crowding, drops and activation; also the layout in which experts choose."""
    n_experts, n_tokens = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    width, hidden = draw(st.sampled_from((6, 8, 15, 16))), draw(st.sampled_from((5, 8, 12, 24)))
    crowding = draw(st.sampled_from(("random", "one crowd", "first idle", "experts choose")))
    share = draw(st.sampled_from(("all", "some", "none")))
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    torch.manual_seed(draw(st.integers(0, 999)))
    if crowding == "experts choose":
        ids = torch.arange(n_experts).expand(n_tokens, -1)
    else:
        ids = choose(crowding, n_tokens, n_experts, draw(st.integers(1, n_experts)))
    rows = 2 * hidden if activation == "swiglu" else hidden
    return Problem(
        x=torch.randn(n_tokens, width),
        ids=ids,
        weights=torch.rand(ids.shape) + 0.1,
        first=torch.randn(n_experts, rows, width) / width**0.5,
        down=torch.randn(n_experts, width, hidden) / hidden**0.5,
        kept=keep(share, ids),
        activation=activation,
    )


def brute_force(x, routing, first, down, activation) -> Tensor:
    """All experts on all tokens, times zero where not chosen: nothing is sorted or gathered."""
    weights = routing.weights if routing.kept is None else routing.weights * routing.kept
    gates = torch.zeros(len(x), len(first), dtype=x.dtype).scatter(1, routing.ids, weights)
    hidden = torch.einsum("nd,efd->nef", x, first)
    if activation is ACTIVATIONS["gelu"]:
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    else:
        gate, up = hidden.tensor_split(2, dim=-1)
        hidden = gate / (1 + torch.exp(-gate)) * up
    return torch.einsum("ne,nef,edf->nd", gates, hidden, down)


def run(dispatch, problem: Problem) -> list[Tensor]:
    """Output and the gradients of x, weights, first and down, for one fixed output gradient."""
    x, weights, first, down = leaves = [
        getattr(problem, name).detach().clone().requires_grad_()
        for name in ("x", "weights", "first", "down")
    ]
    routing = routing_of(problem.ids, weights, len(first), problem.kept)
    y = dispatch(x, routing, first, down, ACTIVATIONS[problem.activation])
    direction = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * direction.to(y.dtype)).sum(), leaves)]


def distance(values: list[Tensor], problem: Problem) -> float:
    """Largest distance of an output or gradient to its float64 brute force, over that one's size.

    A weight's gradient is an inner product that may cancel: its size is that of the output.
    """
    references = run(brute_force, problem.to(torch.float64))
    y, _, of_weights, *_ = references
    sizes = [one.norm() for one in references]
    sizes[2] = max(of_weights.norm(), y.norm())
    pairs = zip(values, references, sizes, strict=True)
    return max(float((v.double() - r).norm() / size.clamp_min(1e-9)) for v, r, size in pairs)


# A value goes through about 8 roundings on its way to y (both factors of each of two products, the
# products, the activation, the combine), and a gradient through as many again. Each is at most half
# a unit in the last place, so 16 that all point one way give the distance that is allowed.
FP32, BF16 = 16 * 2**-24, 16 * 2**-9


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
@given(problem=problems())
def test_every_dispatch_equals_brute_force(dispatch, problem):
    assert distance(run(dispatch, problem), problem) < FP32


@given(problem=problems())
def test_the_float64_loop_is_exact(problem):
    assert distance(run(loop, problem.to(torch.float64)), problem) < 1e-14


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
@given(problem=problems())
def test_bf16_autocast_stays_near_brute_force(dispatch, problem):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = run(dispatch, problem)
    assert all(one.dtype == torch.float32 for one in values)
    assert distance(values, problem) < BF16


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
@given(problem=problems())
def test_bf16_tensors_stay_bf16_and_near_brute_force(dispatch, problem):
    values = run(dispatch, problem.to(torch.bfloat16))
    assert [one.dtype for one in values] == [
        torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16
    ]  # fmt: skip
    assert distance(values, problem) < BF16


class PoisonedGroupedProduct(torch.autograd.Function):
    """`grouped_mm` whose rows behind the last group are NaN, both of the product and of gradients.

    The real one leaves them unwritten, so they hold whatever the memory held.
    """

    @staticmethod
    def forward(ctx, rows, matrices, ends):
        ctx.save_for_backward(rows, matrices, ends)
        product = rows.new_full((len(rows), matrices.shape[-1]), torch.nan)
        for matrix, group in zip(matrices, groups_of(ends), strict=True):
            product[group] = rows[group] @ matrix
        return product

    @staticmethod
    def backward(ctx, gradient):
        rows, matrices, ends = ctx.saved_tensors
        of_rows, of_matrices = torch.full_like(rows, torch.nan), torch.empty_like(matrices)
        for expert, group in enumerate(groups_of(ends)):
            of_rows[group] = gradient[group] @ matrices[expert].mT
            of_matrices[expert] = rows[group].mT @ gradient[group]
        return of_rows, of_matrices, None


def groups_of(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(*pair) for pair in zip([0, *stops], stops, strict=False)]


@given(problem=problems())
def test_unwritten_rows_reach_neither_output_nor_gradients(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nano_moe.model.experts.F.grouped_mm",
            lambda rows, matrices, *, offs: PoisonedGroupedProduct.apply(rows, matrices, offs),
        )
        values = run(grouped, problem)
    assert all(one.isfinite().all() for one in values)
    assert distance(values, problem) < FP32


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
def test_a_token_whose_assignments_are_all_dropped_gets_exactly_zero(dispatch):
    torch.manual_seed(0)
    ids = choose("random", 6, 4, 2)
    kept = torch.tensor([[True, True], [False, False], [True, False]]).repeat(2, 1)
    weights = torch.full((6, 2), 1e30)
    problem = Problem(
        torch.randn(6, 8), ids, weights, torch.randn(4, 32, 8), torch.randn(4, 8, 16), kept
    )
    y, of_x, of_weights, *_ = run(dispatch, problem)
    assert not y[[1, 4]].any() and not of_x[[1, 4]].any()
    assert not of_weights[~kept].any() and of_weights[kept].all()
    assert y[[0, 2, 3, 5]].all() and of_x[[0, 2, 3, 5]].all()


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
def test_idle_experts_change_nothing_and_get_zero_gradients(dispatch):
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(5, 8), torch.randn(4, 32, 8), torch.randn(4, 8, 16)
    ids, weights = torch.full((5, 1), 2), torch.rand(5, 1)
    with_idle = run(dispatch, Problem(x, ids, weights, gate_up, down))
    alone = run(dispatch, Problem(x, torch.zeros_like(ids), weights, gate_up[2:3], down[2:3]))
    for all_four, only_one in zip(with_idle[:3], alone[:3], strict=True):
        torch.testing.assert_close(all_four, only_one)
    for all_four, only_one in zip(with_idle[3:], alone[3:], strict=True):
        torch.testing.assert_close(all_four[2:3], only_one)
        assert not all_four[[0, 1, 3]].any()


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
@pytest.mark.parametrize("kept", [None, torch.empty(0, 2, dtype=torch.bool)])
def test_no_tokens_give_no_rows(dispatch, kept):
    routing = routing_of(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 4, kept)
    y = dispatch(torch.empty(0, 8), routing, torch.randn(4, 32, 8), torch.randn(4, 8, 16))
    assert y.shape == (0, 8)


@pytest.mark.parametrize("dispatch", [loop, grouped, fused])
@pytest.mark.parametrize("top_k", [1, 3])
def test_swapping_tokens_swaps_rows_and_nothing_else(dispatch, top_k):
    torch.manual_seed(1)
    x, gate_up, down = torch.randn(9, 8), torch.randn(4, 32, 8), torch.randn(4, 8, 16)
    ids, weights = choose("random", 9, 4, top_k), torch.rand(9, top_k)
    order = torch.randperm(9)
    y = dispatch(x, routing_of(ids, weights, 4), gate_up, down)
    swapped = dispatch(x[order], routing_of(ids[order], weights[order], 4), gate_up, down)
    torch.testing.assert_close(swapped, y[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_runs_where_grouped_products_cannot(monkeypatch, dtype):
    torch.manual_seed(2)
    auto = Experts(3, 16, 8, "auto").to(dtype)
    for parameter in auto.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 16, dtype=dtype)
    routing = routing_of(choose("random", 7, 3, 2), torch.rand(7, 2, dtype=dtype), 3)
    expected = loop(x, routing, auto.gate_up, auto.down)
    torch.testing.assert_close(auto(x, routing), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(auto(x, routing), expected)


@pytest.mark.parametrize(("compiling", "chosen"), [(False, "fused"), (True, "grouped")])
def test_the_backend_that_is_named_runs_and_auto_chooses(monkeypatch, compiling, chosen):
    ran = []
    for name in ("loop", "grouped", "fused"):
        monkeypatch.setitem(DISPATCH, name, lambda x, *_, name=name: ran.append(name) or x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    routing = routing_of(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 1)
    for backend in ("loop", "grouped", "fused", "auto"):
        Experts(1, 8, 8, backend)(torch.randn(2, 8, dtype=torch.bfloat16), routing)
    assert ran == ["loop", "grouped", "fused", chosen]


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_uneven_loads_change_nothing(dtype, weights_dtype):
    """Every other expert has forty times the load: in bf16 experts are sorted to share products."""
    torch.manual_seed(4)
    counts = [400, 10] * 8
    assert len(plan(sorted(counts), 10_000, dtype)) < len(plan(counts, 10_000, dtype))
    ids = torch.arange(16).repeat_interleave(torch.tensor(counts)).unsqueeze(-1)
    ids = ids[torch.randperm(len(ids))]
    x, weights = torch.randn(len(ids), 16, dtype=dtype), torch.rand(len(ids), 1)
    gate_up, down = torch.randn(16, 48, 16), torch.randn(16, 16, 24)
    problem = Problem(x, ids, weights, gate_up.to(weights_dtype), down.to(weights_dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != weights_dtype):
        pairs = list(zip(run(fused, problem), run(loop, problem), strict=True))
    rounded = torch.bfloat16 in (dtype, weights_dtype)
    for mine, reference in pairs:
        assert mine.dtype == reference.dtype
        error = (mine.double() - reference.double()).norm() / reference.double().norm()
        assert error < (2e-2 if rounded else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [10_000, 10**9])
def test_sixty_four_experts_for_a_thousand_tokens(monkeypatch, dtype, room):
    """The size that is timed, in many products and in few."""
    monkeypatch.setattr("nano_moe.model.fused.CACHE_BYTES", room)
    monkeypatch.setattr("nano_moe.model.fused.CHUNK_BYTES", {torch.bfloat16: room})
    torch.manual_seed(5)
    ids = best_experts(torch.randn(1000, 64), 8)
    problem = Problem(
        torch.randn(1000, 16), ids, torch.rand(ids.shape),
        torch.randn(64, 24, 16) / 4, torch.randn(64, 16, 12) / 4,
    )  # fmt: skip
    for dispatch in (grouped, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            values = run(dispatch, problem)
        assert distance(values, problem) < (BF16 if dtype == torch.bfloat16 else FP32)
