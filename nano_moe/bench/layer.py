"""One feed-forward layer, forward and backward: every dispatch against an equal dense FFN.

All cases of a round see the same tokens, and every round new ones: as in training, the tokens per
expert never repeat, so nothing that is cached by shape (bf16 products are) looks faster than it is.

Shapes: N tokens, D d_model, E experts, K top_k, F expert hidden width, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nano_moe.bench.dense import SeparateFFN
from nano_moe.bench.profile import shares
from nano_moe.bench.report import Report, Row
from nano_moe.bench.timing import QUICK, Budget, Case, Timings, interleave
from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.model.experts import DISPATCH
from nano_moe.model.ffn import FFN
from nano_moe.model.moe import MoE

M = TypeVar("M", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE = ("dense, fused", "dense, separate")
FLOORS = ("floor, loop", "floor, batched")
PROFILED = 5  # rounds
SKEW = 0.1  # of the tokens' common part: gives a max_vio of about 0.2 with 8 experts, 0.5 with 64

NOTES = (
    "ratio: time over the dense FFN's (the faster of fused and separate gate/up products) in the "
    "same round; dense hidden width = top_k x expert hidden width, so equal active FLOPs but for "
    "the router, which only the sparse layers compute.",
    "floor: the six bare products of each expert, nothing else (the faster of a loop of mm over "
    "the round's own counts and one bmm over equal ones); of floor: its time over the case's.",
    "the second table: shares of the time of auto by kind of operator; activation holds the walk "
    "over the experts as well.",
    "bf16: float32 weights and tokens under CPU autocast, as in training.",
)


class Shape(NamedTuple):
    """A layer to time, and the ratio to dense that we aim at with `auto`."""

    tokens: int
    width: int
    n_experts: int
    top_k: int
    hidden: int
    targets: dict[str, float]

    def __str__(self) -> str:
        return (
            f"N {self.tokens}, D {self.width}, {self.n_experts} experts top-{self.top_k} "
            f"(F {self.hidden})"
        )

    def config(self, backend: str = "auto") -> ModelConfig:
        """A one-layer decoder whose FFN this is."""
        return ModelConfig(
            vocab_size=2,
            context=2,
            n_layers=1,
            d_model=self.width,
            n_heads=1,
            d_ff=self.top_k * self.hidden,
            moe=MoEConfig.model_validate(
                {"n_experts": self.n_experts, "top_k": self.top_k, "backend": backend}
            ),
        )


SHAPES = (
    Shape(4096, 256, 8, 2, 512, {"fp32": 1.03, "bf16": 1.15}),
    Shape(8192, 384, 8, 2, 768, {"fp32": 0.95, "bf16": 1.00}),
    Shape(768, 128, 8, 2, 256, {"fp32": 1.35, "bf16": 1.7}),
    Shape(8192, 384, 64, 8, 192, {"fp32": 1.05, "bf16": 1.30}),
    Shape(768, 128, 64, 8, 64, {"fp32": 2.1}),
    Shape(4096, 128, 8, 2, 192, {}),  # the anchor's, recipes/mixtral.yaml
    Shape(4096, 128, 64, 8, 48, {}),  # the same width in finer experts
)
TINY = (Shape(32, 16, 4, 2, 8, {"fp32": 1.0}),)


def layer(quick: bool) -> Report:
    shapes, budget = (TINY, QUICK) if quick else (SHAPES, Budget(seconds=8, min_rounds=5))
    rows: list[Row] = []
    profiles: list[Row] = []
    failed: list[str] = []
    for shape in shapes:
        for precision in DTYPES:
            trial = Trial(shape, precision)
            failed += trial.failed
            rows += table(trial, interleave(trial.cases, budget, before_round=trial.refresh))
            profiles.append(where(trial))
    return Report("One FFN, forward and backward", [*rows, *profiles], (*NOTES, *failed))


def where(trial: Trial) -> Row:
    """Where the time of `auto` goes."""
    of_kinds = shares(trial.cases["auto"], PROFILED, first=0)
    return {"shape": str(trial.shape), "precision": trial.precision, **of_kinds}


def table(trial: Trial, timings: Timings) -> Iterator[Row]:
    """A row per case; the targets stand beside `auto`."""
    dense, floor = timings.fastest(DENSE), timings.fastest(FLOORS)
    for case in timings.seconds:
        target = trial.shape.targets.get(trial.precision) if case == "auto" else None
        ratio = timings.ratio(case, dense)
        yield {
            "shape": str(trial.shape),
            "precision": trial.precision,
            "case": case,
            "ms": timings.spread(case).scaled(1e3),
            "ratio": ratio,
            "of floor": timings.ratio(floor, case).median,
            "target": target,
            "met": None if target is None else ratio.median <= target,
            "rounds": timings.rounds,
        }


class Trial:
    """The cases of one shape and precision, with the tokens that they share."""

    def __init__(self, shape: Shape, precision: str):
        self.shape, self.precision = shape, precision
        self.x = torch.empty(1, shape.tokens, shape.width, requires_grad=True)
        self.dy = torch.randn(1, shape.tokens, shape.width)
        self.generator = torch.Generator().manual_seed(0)
        self.floor = Floor(shape, DTYPES[precision])
        self.failed: list[str] = []
        self.sparse = _drawn(MoE(shape.config()))
        self.refresh(0)
        ffn = _drawn(FFN(shape.width, shape.top_k * shape.hidden))
        cases = [self._through(module) for module in (ffn, _drawn(SeparateFFN(ffn)))]
        self.cases: dict[str, Case] = dict(zip(DENSE, cases, strict=True))
        self.cases |= self._dispatches()
        self.cases |= dict(zip(FLOORS, (self.floor.loop, self.floor.batched), strict=True))

    def refresh(self, number: int) -> None:
        """New tokens, with a part in common that loads the experts unevenly."""
        with torch.no_grad():
            self.x.normal_(generator=self.generator)
            self.x += SKEW * torch.randn(self.x.shape[-1], generator=self.generator)
            self.floor.counts = self.sparse.router(self.x).counts.tolist()

    def _dispatches(self) -> dict[str, Case]:
        """Every backend that runs here, each on weights of its own, all equal."""
        cases: dict[str, Case] = {}
        for name in (*DISPATCH, "auto"):
            module = MoE(self.shape.config(name))
            module.load_state_dict(self.sparse.state_dict())
            case = self._through(module)
            try:
                case(0)
            except NotImplementedError as error:  # PyTorch has no kernel for this dtype here
                reason = str(error).splitlines()[0]
                self.failed.append(f"{self.shape}, {self.precision}: {name} cannot run ({reason})")
            else:
                cases[name] = case
        return cases

    def _through(self, module: nn.Module) -> Callable[[int], None]:
        """Forward and backward as in training: gradients of weights and input, from none."""
        learnt, bf16 = [self.x, *module.parameters()], self.precision == "bf16"

        def run(number: int) -> None:
            for tensor in learnt:
                tensor.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = module(self.x)[0]
            y.backward(self.dy.to(y.dtype))

        return run


class Floor:
    """The products that no dispatch can avoid: two forward and four backward per expert."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        n_rows, experts = shape.tokens * shape.top_k, shape.n_experts
        width, hidden = shape.width, shape.hidden
        self.counts = [n_rows // experts] * experts

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes).to(dtype)

        self.first, self.down = draw(experts, 2 * hidden, width), draw(experts, width, hidden)
        self.rows, self.dy = draw(n_rows, width), draw(n_rows, width)
        self.hidden, self.dproduct = draw(n_rows, hidden), draw(n_rows, 2 * hidden)
        self.product, self.dhidden = draw(n_rows, 2 * hidden), draw(n_rows, hidden)
        self.y, self.dx = draw(n_rows, width), draw(n_rows, width)
        self.dfirst, self.ddown = torch.empty_like(self.first), torch.empty_like(self.down)

    def loop(self, number: int) -> None:
        """One expert after the other, as many rows each as the layer's router sent."""
        start = 0
        for expert, n in enumerate(self.counts):
            rows = slice(start, start + n)
            start += n
            first, down = self.first[expert], self.down[expert]
            torch.mm(self.rows[rows], first.T, out=self.product[rows])
            torch.mm(self.hidden[rows], down.T, out=self.y[rows])
            torch.mm(self.dy[rows], down, out=self.dhidden[rows])
            torch.mm(self.dy[rows].T, self.hidden[rows], out=self.ddown[expert])
            torch.mm(self.dproduct[rows].T, self.rows[rows], out=self.dfirst[expert])
            torch.mm(self.dproduct[rows], first, out=self.dx[rows])

    def batched(self, number: int) -> None:
        """All experts in one product, with equally many rows each."""
        experts = len(self.counts)

        def by_expert(x: Tensor) -> Tensor:  # (N*K, ·) -> (E, n, ·)
            return x.view(experts, -1, x.shape[-1])

        rows, dy, hidden = by_expert(self.rows), by_expert(self.dy), by_expert(self.hidden)
        dproduct = by_expert(self.dproduct)
        torch.bmm(rows, self.first.mT, out=by_expert(self.product))
        torch.bmm(hidden, self.down.mT, out=by_expert(self.y))
        torch.bmm(dy, self.down, out=by_expert(self.dhidden))
        torch.bmm(dy.mT, hidden, out=self.ddown)
        torch.bmm(dproduct.mT, rows, out=self.dfirst)
        torch.bmm(dproduct, self.first, out=by_expert(self.dx))


@torch.no_grad()
def _drawn(module: M) -> M:
    """All weights from N(0, 0.05), a usual scale."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.05, generator=generator)
    return module
