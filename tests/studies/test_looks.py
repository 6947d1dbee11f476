"""What is read from trained weights, against counting by hand."""

import numpy as np
import pytest
import torch

from nano_moe.studies import leak, specialization
from nano_moe.studies.specialization import coactivation


@pytest.fixture
def windows():
    """(6, 12) inputs and targets of the tiny vocabulary."""
    drawn = torch.randint(0, 264, (6, 13), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1], drawn[:, 1:]


def test_a_causal_model_has_one_loss_whatever_comes_after(moe_config, build, windows):
    model = build(moe_config()).eval()
    found = leak.losses(model, *windows, rows=2)
    assert found["ce_own_future"] == found["ce_other_future"]
    assert leak.prefix_loss(model, *windows) == pytest.approx(found["ce_whole"], abs=1e-5)


def test_where_experts_choose_the_text_after_a_token_matters(moe_config, build, windows):
    model = build(moe_config(moe={"routing": "expert_choice"})).eval()
    found = leak.losses(model, *windows, rows=2)
    assert abs(found["ce_own_future"] - found["ce_other_future"]) > 1e-3
    assert abs(leak.prefix_loss(model, *windows) - found["ce_whole"]) > 1e-3


def test_coactivation_is_counted_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(50, 5, generator=generator).topk(2, dim=-1).indices  # (N, K)
    chosen = [set(row) for row in ids.tolist()]
    for one in range(5):
        alone = [row for row in chosen if one in row]
        for other in range(5):
            share = sum(other in row for row in alone) / len(alone) if one != other else 0
            assert coactivation(ids, 5)[one, other].item() == pytest.approx(share, abs=1e-4)


def test_information_is_that_of_the_label_above_its_shuffled_floor():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (40, 100), generator=generator)
    noise = torch.randint(0, 4, (4000,), generator=generator)
    attributes = {"known": specialization.Attribute(labels, 4)}
    decided = specialization._layer(0, labels.view(-1, 1), 4, attributes)
    free = specialization._layer(0, noise[:, None], 4, attributes)
    assert decided["known"] == pytest.approx(2.0, abs=0.01)  # bits of four even labels
    assert free["known"] == pytest.approx(free["known_shuffled"], abs=0.004)
    assert decided["known_shuffled"] < 0.01


def test_saturation_is_the_share_of_choices_that_stay(tmp_path):
    class Run:
        path = tmp_path

    folder = specialization.folder_of(Run)
    folder.mkdir()
    final = np.array([[[0, 1], [2, 3]]])  # (L, N, K)
    np.save(folder / "0000005.npy", np.array([[[1, 2], [0, 1]]]))
    np.save(folder / "0000010.npy", np.array([[[1, 0], [2, 0]]]))
    np.save(folder / "0000020.npy", final)
    found = specialization.saturation(Run)
    assert found == {"steps": [5, 10, 20], "layers": [[0.25, 0.75, 1.0]]}
