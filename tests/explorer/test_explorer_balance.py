"""Loads over training, read from real event files."""

import pytest
import torch
from torch.utils.tensorboard.writer import SummaryWriter

from nano_moe.config import MoEConfig
from nano_moe.errors import UserError
from nano_moe.explorer import balance as module
from nano_moe.explorer.balance import POINTS, balance
from nano_moe.explorer.opened import balancing
from nano_moe.model.balance import load_statistics
from nano_moe.studies import worker


def test_loads_are_those_that_were_logged_and_their_figures_those_of_the_decoder(opened):
    found = balance(opened("routed").run)
    assert found["steps"] == [2, 4, 6] and found["tokens_per_step"] == 4 * 48
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    for layer in found["layers"]:
        counts = torch.tensor([[1, 1, 1, 1], [5, 1, 1, 0.05], [9, 1, 1, 0]])
        shares = counts / counts.sum(-1, keepdim=True)
        assert torch.tensor(layer["load"]) == pytest.approx(shares, abs=1e-5)
        figures = load_statistics(counts)
        assert layer["max_vio"] == pytest.approx(figures["max_vio"].tolist(), abs=1e-4)
        assert layer["dead"] == figures["dead_experts"].int().tolist() == [0, 0, 1]
        assert layer["starved"] == [0, 1, 1]


def test_starved_means_what_it_means_in_studies():
    assert module.STARVED == worker.STARVED


def test_a_long_run_is_thinned_and_keeps_its_ends(here, tmp_path):
    run = type("Run", (), {"path": tmp_path, "recipe": lambda: None})
    run.recipe = staticmethod(lambda: type("R", (), {"tokens_per_step": 8}))
    with SummaryWriter(log_dir=str(tmp_path)) as writer:
        for step in range(1, 904):
            for expert in (0, 1):
                writer.add_scalar(f"moe_load/layer0/{expert}", 0.5, step)
    found = balance(run)
    assert found["steps"][0] == 1 and found["steps"][-1] == 903
    assert POINTS / 2 < len(found["steps"]) <= POINTS + 1
    assert len(found["layers"][0]["load"]) == len(found["steps"])


def test_runs_without_loads_say_why(opened, tmp_path):
    with pytest.raises(UserError, match="dense run"):
        opened("dense").balance()
    run = opened("routed").run
    bare = type(run)(tmp_path)
    with pytest.raises(UserError, match="no TensorBoard events"):
        balance(bare)


def test_what_balances_is_said_in_words():
    def words(**fields):
        return balancing(MoEConfig(**{"n_experts": 4, "top_k": 2, **fields}))

    assert words() == "no balancing"
    assert words(load_balancing_loss=0.01) == "load-balancing loss 0.01"
    assert words(score="sigmoid", bias_update_rate=0.001) == "bias, sign rule, 0.001"
    assert words(capacity_factor=1.25, load_balancing_loss=0.1) == (
        "load-balancing loss 0.1, capacity 1.25"
    )
    assert words(routing="hash") == "a fixed hash"
