"""Runs at equal budgets: interpolation, the common budget, and what cannot be compared."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_moe.comparison import compare, interpolate, read_curve
from nano_moe.errors import UserError
from nano_moe.runs import Run

HEADER = "step,tokens,flops,seconds,train/ce,train/load_balancing_loss,train/router_z_loss"
HEADER += ",val/ce,val/bpb"


def run(folder, name: str, points: list[tuple[float, ...]], corpus: str = "c" * 64) -> Run:
    """A run whose validations are (tokens, flops, seconds, ce), with training rows between."""
    made = Run(folder / name)
    made.path.mkdir()
    lines = [HEADER]
    for i, (tokens, flops, seconds, ce) in enumerate(points):
        lines.append(f"{i},{tokens},{flops},{seconds},9.9,,,,")
        lines.append(f"{i},{tokens},{flops},{seconds},,,,{ce},{ce / 2}")
    made.metrics_file.write_text("\n".join(lines) + "\n")
    manifest = {"seed": 7, "corpus": {"sha256": corpus}, "parameters": {"total": 10, "active": 5}}
    made.manifest_file.write_text(json.dumps(manifest))
    return made


POINTS = st.lists(
    st.tuples(st.integers(1, 1000), st.floats(0, 10)),
    min_size=1,
    max_size=8,
    unique_by=lambda p: p[0],
)


@given(POINTS, st.floats(0, 1100))
def test_interpolation_is_linear_between_points_and_absent_before_the_first(points, at):
    xs, ys = zip(*sorted(points), strict=True)
    found = interpolate(at, list(map(float, xs)), list(ys))
    if at < xs[0]:
        assert found is None
    else:
        assert found == pytest.approx(np.interp(at, xs, ys), abs=1e-9)


def test_interpolation_through_a_point_written_twice_does_not_divide_by_zero():
    assert interpolate(5.0, [1.0, 5.0, 5.0, 9.0], [4.0, 3.0, 3.0, 1.0]) == 3.0
    assert interpolate(5.0, [5.0, 5.0, 9.0], [3.0, 3.0, 1.0]) == 3.0
    assert interpolate(7.0, [1.0, 5.0, 5.0, 9.0], [4.0, 3.0, 3.0, 1.0]) == 2.0


def test_each_budget_is_the_least_that_all_runs_spent(tmp_path):
    """Tokens end the first run, FLOPs and seconds the second."""
    cheap = run(tmp_path, "cheap", [(100, 10, 1, 5.0), (200, 20, 2, 4.0)])
    dear = run(tmp_path, "dear", [(100, 5, 0.5, 4.0), (300, 15, 1.5, 2.0)])
    found = compare([cheap, dear])
    assert found["budgets"] == {"tokens": 200, "flops": 15, "seconds": 1.5}
    by_name = {row["run"]: row for row in found["runs"]}
    ce = {
        name: [row[f"at_equal_{b}"]["ce"] for b in ("tokens", "flops", "seconds")]
        for name, row in by_name.items()
    }
    assert ce == {"cheap": [4.0, 4.5, 4.5], "dear": [3.0, 2.0, 2.0]}
    for row in found["runs"]:
        for budget in ("tokens", "flops", "seconds"):
            at = row[f"at_equal_{budget}"]
            assert at["bpb"] == at["ce"] / 2
    assert by_name["dear"]["final"] == {"ce": 2.0, "bpb": 1.0}
    assert by_name["dear"]["parameters"] == {"total": 10, "active": 5}
    assert by_name["dear"]["seed"] == 7


def test_a_run_first_validated_after_the_common_budget_has_no_figure_there(tmp_path):
    early = run(tmp_path, "early", [(50, 5, 1, 5.0)])
    late = run(tmp_path, "late", [(100, 10, 2, 4.0)])
    rows = compare([early, late])["runs"]
    assert [row["at_equal_tokens"]["ce"] for row in rows] == [5.0, None]


def test_the_order_of_runs_does_not_matter_and_is_kept(tmp_path):
    a = run(tmp_path, "a", [(100, 10, 1, 5.0), (200, 20, 2, 4.0)])
    b = run(tmp_path, "b", [(150, 10, 1, 5.0), (180, 20, 2, 4.0)])
    forth, back = compare([a, b]), compare([b, a])
    assert [row["run"] for row in forth["runs"]] == ["a", "b"]
    assert forth["runs"] == back["runs"][::-1] and forth["budgets"] == back["budgets"]


def test_a_run_compared_with_itself_alone_is_at_its_own_end(tmp_path):
    row = compare([run(tmp_path, "a", [(100, 10, 1, 5.0), (200, 20, 2, 4.0)])])["runs"][0]
    assert row["at_equal_tokens"] == row["at_equal_seconds"] == row["final"]


def test_runs_on_different_text_can_be_told_from_the_result(tmp_path):
    a = run(tmp_path, "a", [(1, 1, 1, 5.0)], corpus="a" * 64)
    b = run(tmp_path, "b", [(1, 1, 1, 5.0)], corpus="b" * 64)
    assert len({row["corpus"] for row in compare([a, b])["runs"]}) == 2


def test_a_validation_that_diverged_is_read_as_such(tmp_path):
    assert math.isnan(read_curve(run(tmp_path, "a", [(1, 1, 1, math.nan)])).ce[0])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "has not trained yet"),
        (HEADER + "\n", "no validation yet"),
        (HEADER + "\n1,2,3,4,5.0,,,,\n", "no validation yet"),
        ("", "no validation yet"),
        ("a,b\n1,2\n", "no validation yet"),
        (HEADER + "\n1,2,3,4,,,,many,5\n", "not a metrics file"),
        ("step,val/ce\n1,2\n", "not a metrics file"),
    ],
)
def test_a_metrics_file_that_says_nothing_is_named_in_one_line(tmp_path, content, part):
    made = run(tmp_path, "a", [(1, 1, 1, 5.0)])
    made.metrics_file.unlink()
    if content is not None:
        made.metrics_file.write_text(content)
    with pytest.raises(UserError, match=part) as error:
        compare([made])
    assert str(made.metrics_file) in str(error.value) and "\n" not in str(error.value)
