"""Experts shared out over processes: the same as in one, and every byte accounted for."""

from __future__ import annotations

import pytest
from expert_cases import CONTEXT, GRADED, MODELS, RANKS, every_case

from nano_moe.bench.group import on_ranks

GROUPS = (4, 2)  # expert ranks, times 1 and 2 data ranks
EXACT = 1e-12


@pytest.fixture(scope="module")
def found():
    """found[rank][case]: what each of four processes found."""
    return on_ranks(RANKS, every_case)


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize("name", [*MODELS, *GRADED])
def test_forward_and_gradients_are_those_of_one_process_on_the_whole_batch(found, name, ranks):
    for rank in found:
        case = rank[f"{name} on {ranks}"]
        assert case["forward"] <= EXACT and case["gradients"] <= EXACT


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize("backend", ["loop", "grouped", "fused"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.04)])
def test_every_backend_in_narrow_dtypes(found, backend, dtype, limit, ranks):
    for rank in found:
        assert max(rank[f"{backend} in {dtype} on {ranks}"].values()) <= limit


@pytest.mark.parametrize("ranks", GROUPS)
@pytest.mark.parametrize("precision", ["", ", autocast"])
@pytest.mark.parametrize("kind", ["choice", "hash"])
def test_the_bytes_reported_are_those_handed_to_the_collectives(found, kind, precision, ranks):
    cases = [rank[f"traffic of {kind}{precision} on {ranks}"] for rank in found]
    for case in cases:
        assert case["reported"] == case["metered"]
        assert case["rows"][0] == case["rows"][1] > 0
    assert sum(case["rows"][0] for case in cases) == sum(case["rows_in"] for case in cases)


@pytest.mark.parametrize("precision", ["", ", autocast"])
def test_bytes_by_hand(found, precision):
    """Per token and rank: 16 numbers there, 16 back, 2 weights and 2 ids; 3 counts of 8 bytes."""
    width = 2 if precision else 4
    for rank in found:
        case = rank[f"traffic of choice{precision} on 4"]
        out, into = case["rows"][0], case["rows_in"]
        forward = out * (16 * width + 2 * 4 + 2 * 4) + into * 16 * 4 + 3 * 8
        assert case["reported"] == [forward, into * (16 * width + 2 * 4) + out * 16 * 4]


def test_ranks_without_tokens_or_without_work_take_part(found):
    for rank, results in enumerate(found):
        case = results["empty"]
        n_sequences = 0 if rank == 1 else 1
        assert case["shape"] == case["x"] == [n_sequences, CONTEXT, 16]
        assert (case["gradient"] > 0) == (rank == 1)  # experts 2 and 3 are rank 1's


@pytest.mark.parametrize("ranks", GROUPS)
def test_a_state_dict_goes_from_any_layout_to_any_other(found, ranks):
    for rank in found:
        case = rank[f"state on {ranks}"]
        assert case["same"] and case["again"]
        assert case["held"] == case["whole"] - case["experts"] * (ranks - 1) / ranks


def test_what_cannot_be_exact_is_refused(found):
    for rank in found:
        refused = rank["refused"]
        assert "expert_choice" in refused["expert_choice"]
        assert "n_experts=6" in refused["six"] and "4 expert ranks" in refused["six"]
        assert "4 processes" in refused["mesh"] and "3 expert ranks" in refused["mesh"]


def test_groups_that_are_a_part_of_the_job_are_as_patient_as_they_are_told(found):
    """PyTorch's 30 minutes otherwise, while the rest of the job gives a silent rank up."""
    for rank in found:
        assert rank["patience"] == [77, 300, 77, 77]
