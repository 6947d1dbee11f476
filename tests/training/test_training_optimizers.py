"""MuonAdamW against PyTorch's own optimizers, and the schedules against their definitions."""

import copy

import pytest
import torch
from torch import nn

from nano_moe.config import OptimConfig
from nano_moe.model.gpt import GPT
from nano_moe.training import elementwise, optimizers
from nano_moe.training.module import Decoder
from nano_moe.training.optimizers import MuonAdamW, newton_schulz, parameter_groups
from nano_moe.training.schedule import multiplier

CONFIG = OptimConfig(lr=0.02, weight_decay=0.1, newton_schulz="fp32")


def group(*parameters: nn.Parameter, muon: bool, fused: bool = False, **options) -> dict:
    flags = [fused] * len(parameters)
    options = {"lr": 0.02, "weight_decay": 0.1} | options
    return {"name": "g", "params": list(parameters), "muon": muon, "fused": flags, **options}


def draws(*shape: int, n: int = 5, seed: int = 0, dtype=torch.float32) -> list[torch.Tensor]:
    """A start and n gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(n + 1)]


def walk(optimizer, parameters: list[nn.Parameter], gradients: list[list[torch.Tensor]]) -> None:
    for at_step in gradients:
        for parameter, gradient in zip(parameters, at_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def moved_by_muon(start: torch.Tensor, gradients: list[torch.Tensor], *, fused: bool = False):
    parameter = nn.Parameter(start.clone())
    optimizer = MuonAdamW([group(parameter, muon=True, fused=fused)], CONFIG)
    walk(optimizer, [parameter], [[gradient] for gradient in gradients])
    return parameter.detach()


# --- Newton-Schulz -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (2, 32, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orthogonalizing_moves_all_singular_values_near_one_and_keeps_the_directions(shape, dtype):
    """From singular values that span a factor of 30, at any overall size."""
    n, rows, columns = shape
    u = torch.linalg.qr(draws(n, rows, rows, n=0)[0]).Q.double()
    v = torch.linalg.qr(draws(n, columns, columns, n=0, seed=1)[0]).Q.double()[:, :, :rows]
    values = torch.logspace(0, -1.5, rows, dtype=torch.float64)
    for size in (1e-3, 1.0, 1e4):
        matrices = (u * values * size) @ v.mT
        found = newton_schulz((matrices / elementwise.norms(matrices)).to(dtype)).double()
        assert found.shape == matrices.shape
        new = torch.linalg.svdvals(found)
        assert new.min() > 0.6 and new.max() < 1.3
        slack = 0.1 if dtype == torch.bfloat16 else 1e-3
        seen = u.mT @ found @ v  # in the directions of before
        diagonal = seen.diagonal(dim1=-2, dim2=-1)
        assert diagonal.min() > 0.6
        assert (seen - torch.diag_embed(diagonal)).abs().max() < slack


def test_orthogonalizing_nothing_gives_nothing():
    assert not newton_schulz(torch.zeros(2, 4, 4)).any()


# --- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_muon_is_torchs_muon_with_adamws_scale(shape):
    """Up to bfloat16, in which PyTorch's runs its iteration."""
    start, *gradients = draws(*shape)
    theirs = nn.Parameter(start.clone())
    muon = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    walk(muon, [theirs], [[gradient] for gradient in gradients])
    mine = moved_by_muon(start, gradients)
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (mine - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8)])
def test_stacked_experts_move_as_each_would_alone(shape):
    start, *gradients = draws(*shape)
    stacked = moved_by_muon(start, gradients)
    alone = [moved_by_muon(start[e], [g[e] for g in gradients]) for e in range(3)]
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 16), (3, 48, 16), (16, 32)])
def test_a_fused_gate_up_moves_as_its_two_halves_would_alone(shape):
    start, *gradients = draws(*shape)
    fused = moved_by_muon(start, gradients, fused=True)
    halves = [
        moved_by_muon(start.chunk(2, -2)[i], [g.chunk(2, -2)[i] for g in gradients])
        for i in range(2)
    ]
    torch.testing.assert_close(fused, torch.cat(halves, -2), rtol=1e-4, atol=1e-5)
    whole = moved_by_muon(start, gradients)
    assert (fused - whole).abs().max() > 1e-3  # the flag matters


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_pieces_of_a_batch_are_all_of_it(monkeypatch, most):
    """However many matrices the cache holds, each of nine moves as it would alone."""
    monkeypatch.setattr(optimizers, "NEWTON_SCHULZ_BYTES", most * 8 * 24 * 4)
    starts = draws(4, 8, 24, n=0)[0], draws(5, 8, 24, n=0, seed=1)[0]
    gradients = draws(4, 8, 24, n=2, seed=2)[1:], draws(5, 8, 24, n=2, seed=3)[1:]
    together = [nn.Parameter(start.clone()) for start in starts]
    steps = [list(pair) for pair in zip(*gradients, strict=True)]
    walk(MuonAdamW([group(*together, muon=True)], CONFIG), together, steps)
    for parameter, start, own in zip(together, starts, gradients, strict=True):
        for e in range(len(start)):
            alone = moved_by_muon(start[e], [gradient[e] for gradient in own])
            torch.testing.assert_close(parameter[e].detach(), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("muon", [True, False])
def test_weights_in_bf16_move_as_they_do_in_float32(muon):
    start, *gradients = (x.bfloat16() for x in draws(3, 8, 24))
    wide, narrow = nn.Parameter(start.float()), nn.Parameter(start.clone())
    walk(MuonAdamW([group(wide, muon=muon)], CONFIG), [wide], [[g.float()] for g in gradients])
    walk(MuonAdamW([group(narrow, muon=muon)], CONFIG), [narrow], [[g] for g in gradients])
    moved = (wide - start.float()).norm()
    assert (narrow.float() - wide).norm() < 0.4 * moved  # what rounding five times leaves


def test_parameters_that_share_a_shape_do_not_share_their_steps():
    """They go through one batched iteration; each must come out its own."""
    parts = [draws(8, 16, seed=seed) for seed in range(3)]
    parameters = [nn.Parameter(start.clone()) for start, *_ in parts]
    optimizer = MuonAdamW([group(*parameters, muon=True)], CONFIG)
    walk(optimizer, parameters, list(zip(*(part[1:] for part in parts), strict=True)))
    for parameter, (start, *gradients) in zip(parameters, parts, strict=True):
        expected = moved_by_muon(start, gradients)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_iterations_precision_changes_the_step_by_noise_alone():
    start, *gradients = draws(16, 24)
    moved = {}
    for precision in ("fp32", "bf16"):
        parameter = nn.Parameter(start.clone())
        config = CONFIG.model_copy(update={"newton_schulz": precision})
        optimizer = MuonAdamW([group(parameter, muon=True)], config)
        walk(optimizer, [parameter], [[gradient] for gradient in gradients])
        moved[precision] = parameter.detach() - start
    difference = (moved["fp32"] - moved["bf16"]).norm() / moved["fp32"].norm()
    assert 0 < difference < 0.02


# --- AdamW ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_torchs_adamw(shape, decay):
    start, *gradients = draws(*shape, dtype=torch.float64)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "weight_decay": decay}
    walk(MuonAdamW([group(mine, muon=False, **options)], CONFIG), [mine], [[g] for g in gradients])
    adamw = torch.optim.AdamW([theirs], betas=(CONFIG.beta1, CONFIG.beta2), eps=1e-8, **options)
    walk(adamw, [theirs], [[g] for g in gradients])
    assert (theirs - start).norm() > 0.01
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


# --- both ----------------------------------------------------------------------------------------


def test_a_saved_and_loaded_optimizer_goes_on_bitwise():
    parts = [draws(8, 16, n=8), draws(3, 8, 8, n=8), draws(8, n=8)]
    kinds = (True, True, False)

    def fresh(starts):
        parameters = [nn.Parameter(start.clone()) for start in starts]
        groups = [group(p, muon=muon) for p, muon in zip(parameters, kinds, strict=True)]
        return parameters, MuonAdamW(groups, CONFIG)

    gradients = list(zip(*(part[1:] for part in parts), strict=True))
    whole, optimizer = fresh([part[0] for part in parts])
    walk(optimizer, whole, gradients[:4])
    broken, resumed = fresh([parameter.detach() for parameter in whole])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    walk(optimizer, whole, gradients[4:])
    walk(resumed, broken, gradients[4:])
    for mine, theirs in zip(broken, whole, strict=True):
        assert torch.equal(mine, theirs)


def test_a_parameter_without_a_gradient_is_left_alone():
    for muon in (True, False):
        parameter = nn.Parameter(torch.ones(4, 4))
        MuonAdamW([group(parameter, muon=muon)], CONFIG).step()
        assert torch.equal(parameter, torch.ones(4, 4))


def names(model: nn.Module, found: dict) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in found["params"]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dense", "softmax", "sigmoid"])
def test_each_parameter_is_in_the_group_of_its_role(workshop, kind, tied):
    model = GPT(workshop.recipe(kind, model__tie_embeddings=tied).model)
    config = OptimConfig(lr=0.01, embedding_lr=0.02, router_lr=0.003, weight_decay=0.2)
    groups = {found["name"]: found for found in parameter_groups(model, config)}
    assert sum(len(found["params"]) for found in groups.values()) == len(list(model.parameters()))
    matrices = ("_proj.weight", "gate_up", "gate_up.weight", "down", "down.weight")
    roles = {
        "router": {n for n, _ in model.named_parameters() if ".router." in n},
        "hidden": {n for n, _ in model.named_parameters() if n.endswith(matrices)},
    }
    roles["embedding"] = (
        {n for n, _ in model.named_parameters()} - roles["router"] - roles["hidden"]
    )
    assert ("head.weight" in roles["embedding"]) != tied
    assert {name: names(model, found) for name, found in groups.items()} == {
        name: members for name, members in roles.items() if members
    }
    expected = {"hidden": (0.01, 0.2, True), "router": (0.003, 0, False)}
    expected["embedding"] = (0.02, 0, False)
    for name, found in groups.items():
        assert (found["lr"], found["weight_decay"], found["muon"]) == expected[name]
    hidden = groups["hidden"]
    fused = [p for p, flag in zip(hidden["params"], hidden["fused"], strict=True) if flag]
    assert names(model, {"params": fused}) == {n for n in roles["hidden"] if "gate_up" in n}
    assert not any(flag for name in groups if name != "hidden" for flag in groups[name]["fused"])


def test_a_matrix_of_no_known_part_is_no_ones():
    block = nn.ModuleDict({"blocks": nn.ModuleDict({"gate": nn.Linear(2, 2, bias=False)})})
    with pytest.raises(AssertionError, match="blocks.gate.weight: say in .*optimizers"):
        parameter_groups(block, CONFIG)


def test_learning_rates_default_to_that_of_hidden_matrices(workshop):
    model = GPT(workshop.recipe("softmax").model)
    for given, expected in (({}, 0.01), ({"embedding_lr": 0.5}, 0.5)):
        groups = parameter_groups(model, OptimConfig(lr=0.01, **given))
        rates = {found["name"]: found["lr"] for found in groups}
        assert rates == {"hidden": 0.01, "embedding": expected, "router": expected}


def test_experts_have_a_rate_of_their_own_where_it_is_given(workshop):
    model = GPT(workshop.recipe("softmax").model)
    groups = parameter_groups(model, OptimConfig(lr=0.01, expert_lr=0.03, weight_decay=0.2))
    found = {group["name"]: group for group in groups}
    assert list(found) == ["hidden", "experts", "router", "embedding"]
    routed = {name for name, _ in model.named_parameters() if ".experts." in name}
    assert names(model, found["experts"]) == routed and routed
    experts = found["experts"]
    assert (experts["lr"], experts["weight_decay"], experts["muon"]) == (0.03, 0.2, True)
    assert sorted(experts["fused"]) == sorted("gate_up" in name for name in routed)
    with pytest.raises(ValueError, match="there are no experts"):
        workshop.recipe("dense", optim__expert_lr=0.03)


def test_an_experts_rate_equal_to_the_others_changes_nothing(workshop):
    trained = []
    for rate in (None, 0.01):
        recipe = workshop.recipe("softmax", optim__lr=0.01, optim__expert_lr=rate)
        module = Decoder(recipe)
        (optimizer,), _ = module.configure_optimizers()
        tokens = torch.arange(2 * 13).view(2, 13) % 50
        for _ in range(3):
            module.training_step(tokens, 0)["loss"].backward()
            module.on_before_optimizer_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


def test_adamw_alone_keeps_the_groups_and_drops_muon(workshop):
    model = GPT(workshop.recipe("softmax").model)
    groups = parameter_groups(model, OptimConfig(name="adamw", lr=0.01))
    assert [found["name"] for found in groups] == ["hidden", "router", "embedding"]
    assert not any(found["muon"] for found in groups)


# --- schedules -----------------------------------------------------------------------------------


def course(n: int, **options) -> list[float]:
    config = OptimConfig(lr=1.0, **options)
    return [multiplier(step, n, config) for step in range(n)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 30])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_schedule_rises_evenly_to_its_peak_and_falls_to_its_floor(schedule, warmup, floor):
    shares = course(100, schedule=schedule, warmup_steps=warmup, min_lr_ratio=floor)
    rise, fall = shares[:warmup], shares[warmup:]
    assert min(fall) > floor and shares[0] > 0
    assert fall[0] == max(shares) == 1
    steps = [b - a for a, b in zip([0, *rise], [*rise, 1.0], strict=True)]
    assert steps == pytest.approx([1 / (warmup + 1)] * (warmup + 1))
    assert fall == sorted(fall, reverse=True)
    assert shares[-1] < floor + (1 - floor) * 0.06


def test_the_cosine_is_half_way_down_in_the_middle():
    shares = course(101, schedule="cosine", warmup_steps=1, min_lr_ratio=0.2)
    assert shares[51] == pytest.approx(0.6)
    assert shares[1 + 25] - 0.6 == pytest.approx(0.6 - shares[1 + 75])  # symmetric about it
    assert shares[26] == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_wsd_is_flat_and_then_a_straight_line(fraction):
    shares = course(100, schedule="wsd", decay_fraction=fraction, min_lr_ratio=0.1)
    flat = round(100 * (1 - fraction))
    assert shares[: flat + 1] == [1.0] * (flat + 1)
    drops = [a - b for a, b in zip(shares[flat:], shares[flat + 1 :], strict=False)]
    assert drops == pytest.approx([0.9 / (100 * fraction)] * (99 - flat))


def test_a_one_step_training_has_a_learning_rate():
    assert course(1, schedule="cosine") == course(1, schedule="wsd") == [1.0]
