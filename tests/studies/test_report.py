"""What a reader is told of a comparison."""

import math

import pytest
from matplotlib.figure import Figure

from nano_moe.studies import figures, report, sections
from nano_moe.studies.balance_tables import BALANCE, balance_table
from nano_moe.studies.time_tables import time_tables

PLAIN = {
    "says": "sparse ends below dense", "verdict": "reproduced", "figure": "ce", "relative": False,
    "mean": 0.0876, "low": 0.08, "high": 0.0951, "n": 5, "smallest_effect": 0.02,
    "detectable": 0.0075, "equal": ["tokens"],
}  # fmt: skip


def test_a_gain_has_its_interval_its_unit_and_n():
    assert sections.gain(PLAIN) == "0.088 nats per token (0.080 to 0.095, n = 5)"
    alone = {**PLAIN, "low": None, "high": None, "n": 1}
    assert sections.gain(alone) == "0.088 nats per token (n = 1)"


def test_a_relative_gain_is_a_factor():
    logs = {"mean": math.log(2), "low": math.log(1.5), "high": math.log(2.5)}
    one = {**PLAIN, **logs, "relative": True, "figure": "memory_gb"}
    assert sections.gain(one) == "× 2.00 (1.50 to 2.50, n = 5)"


def test_an_answer_is_the_headline_and_the_rest():
    told = (("a", "reversed"), ("b", "reproduced"), ("c", "reversed"))
    others = [{**PLAIN, "says": says, "verdict": verdict} for says, verdict in told]
    assert sections.answer({"comparisons": [PLAIN, *others]}) == (
        "Reproduced: sparse ends below dense; gain 0.088 nats per token (0.080 to 0.095, n = 5)."
        "\n\n*Reversed* (the contrary holds): a; c.\n\n*Reproduced*: b."
    )
    had = {"part": "sparse", "whole": "large", "base": "dense", "mean": 0.6, "low": 0.5,
           "high": 0.7, "of": 0.1, "flops_share": 0.4}  # fmt: skip
    assert sections.answer({"comparisons": [PLAIN], "recovered": had}).endswith(
        "n = 5); that is 60% (50% to 70%) of the 0.100 that `large` gains on `dense`, at 40% of "
        "its FLOPs."
    )
    more = {**had, "mean": 3.8, "low": 2.4, "high": 8.0}
    assert sections.answer({"comparisons": [PLAIN], "recovered": more}).endswith(
        "; that is more than all of the 0.100 that `large` gains on `dense`, at 40% of its FLOPs."
    )


def test_further_compute_has_its_price():
    """0.0876 nats for 4 TFLOPs more; none of a router's 1 %, a cheaper side, a trend or a loss."""
    members = {"small": {"train_flops": 16e12}, "big": {"train_flops": 20e12}}
    members["router"] = {"train_flops": 16.16e12}
    pairs = (("big", "small"), ("small", "big"), ("router", "small"))
    content = {
        "members": members,
        "comparisons": [
            PLAIN,
            {**PLAIN, "better": "big", "than": "small", "mean": -0.1},
            *({**PLAIN, "better": one, "than": than} for one, than in pairs),
        ],
    }
    assert list(sections.price(content)) == [
        "- sparse ends below dense: 4.0 TFLOPs more, 0.0219 nats for each"
    ]


def test_a_verdict_at_equal_time_is_told_at_the_measured_ratios(time_content):
    """Halfway in log steps is halfway in loss; a ratio outside of the quartiles is remarked."""
    told = time_tables(time_content)
    assert "2.00: 250 steps, -0.050; 2.83: 177 steps, -0.100; 4.00: 125 steps, -0.150" in told
    assert "too" not in told
    time_content["step_times"]["short"]["rule"] = 5.0
    assert (
        "takes less long here than its rule says: its verdict in time is too hard"
        in time_tables(time_content)
    )
    time_content["step_times"]["short"]["rule"] = 1.5
    assert "its verdict in time is too kind" in time_tables(time_content)


@pytest.fixture
def time_content():
    """A dense run of 500 steps at 4.0, sparse ones of 125 steps at 4.15 and of 500 at 3.95."""
    ends = {"dense": (500, 4.0), "short": (125, 4.15), "long": (500, 3.95)}
    kinds = {"dense": "dense", "short": "sparse", "long": "sparse"}
    return {
        "comparisons": [{"better": "short", "than": "dense", "equal": ["time"], "figure": "ce"}],
        "members": {
            name: {"recipe": {"model": kinds[name], "trainer": {"steps": steps}}}
            for name, (steps, _) in ends.items()
        },
        "runs": [
            {"member": name, "seed": seed, "ce": ce + seed / 10}
            for name, (_, ce) in ends.items()
            for seed in (1, 2)
        ],
        "step_times": {
            "dense": {"rule": 1, "measured": [1, 1, 1]},
            "short": {"rule": 3, "measured": [2, 8**0.5, 4]},
        },
    }


def test_a_verdict_that_a_second_draw_does_not_confirm_is_undecided():
    lost = {**PLAIN, "says": "b", "verdict": "not reproduced"}
    first = {"comparisons": [PLAIN, lost]}
    again = {"comparisons": [PLAIN, {**lost, "verdict": "reversed"}]}

    def verdicts(second):
        return [final for _, final, _ in sections.claims(first, second)]

    assert verdicts(None) == verdicts(first) == ["reproduced", "not reproduced"]
    assert verdicts(again) == ["reproduced", sections.UNDECIDED]
    assert "*Undecided at this scale*: b" in sections.answer(first, again)


def test_a_headline_that_flips_is_told_with_both_gains():
    first = {"comparisons": [{**PLAIN, "mean": 0.1, "low": 0.08, "high": 0.12}]}
    other = {**PLAIN, "mean": -0.01, "low": -0.03, "high": 0.01, "verdict": "not reproduced"}
    told = sections.answer(first, {"comparisons": [other]})
    assert told.startswith(f"Undecided at this scale: {PLAIN['says']}; gain 0.100 nats per token")
    assert ": reproduced; a second draw: -0.010 nats per token" in told
    assert told.endswith(": not reproduced.")


def test_every_member_with_experts_has_its_balance_and_drops():
    runs = [
        {"member": "a", "dropped_share": 0.0},
        *({"member": "b", **dict.fromkeys(BALANCE, n), "dropped_share": n / 4} for n in (1, 2)),
    ]
    found = balance_table({"members": {"a": {}, "b": {}}, "runs": runs})
    assert "| b | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 0.38 |" in found and "| a |" not in found
    assert balance_table({"members": {"a": {}}, "runs": runs[:1]}) is None


def test_a_line_is_named_without_what_varies_along_it():
    assert figures._line_name("250", ["top-2 64, 250", "dense 64, 250"]) == "top-2 64"
    assert figures._line_name("64", ["top-2 64, 250", "dense 64, 250"]) == "top-2, 250"
    assert figures._line_name("2", "8 of 16") == "8 of 16"


@pytest.mark.parametrize(
    ("title", "link"), [("The ladder", "the-ladder"), ("A: b, c's (d)", "a-b-cs-d")]
)
def test_an_anchor_is_what_hosts_make_of_a_heading(title, link):
    assert report.anchor(title) == link


def test_a_trend_says_that_it_is_an_average_and_what_its_n_counts():
    slope = {**PLAIN, "per": "doubling of tokens", "n": 3}
    assert sections.gain({**slope, "lines": [{}]}).endswith(
        "nats per token per doubling of tokens, on average (0.080 to 0.095, n = 3)"
    )
    assert sections.gain({**slope, "lines": [{}] * 3}).endswith("n = 3, 3 lines of 1 seed)")
    assert sections.gain({**slope, "lines": [{}] * 3, "n": 6}).endswith("6, 3 lines of 2 seeds)")


def test_a_trend_is_drawn_with_its_fit_and_the_members_beside_it():
    """CE 4, 3.9, 3.8 at 2, 4, 8 experts falls by 0.1 a doubling; 16 ran with one seed of two."""
    losses = {"dense": [4.2, 4.2], "two": [3.9, 4.1], "four": [3.9] * 2, "eight": [3.8] * 2}
    losses["sixteen"] = [3.5]
    counts = dict(zip(losses, (None, 2, 4, 8, 16), strict=True))
    content = {
        "members": {
            name: {"recipe": {"model": {"moe": {"n_experts": count} if count else None}}}
            for name, count in counts.items()
        },
        "runs": [{"member": name, "ce": ce} for name, ces in losses.items() for ce in ces],
    }
    trend = {
        "lines": [{"2": "two", "4": "four", "8": "eight"}],
        "figure": "ce",
        "mean": 0.1,
        "points": [{"x": [2, 4, 8]}],
    }
    axes = Figure().subplots()
    figures._slope(axes, content, trend)
    joined, fit = (line for line in axes.get_lines() if not line.get_label().startswith("_"))
    assert list(joined.get_xdata()) == [1, 2, 4, 8]
    assert list(joined.get_ydata()) == pytest.approx([4.2, 4.0, 3.9, 3.8])
    assert (list(fit.get_xdata()), list(fit.get_ydata())) == ([2, 8], pytest.approx([4.0, 3.8]))
    drawn = [x for line in axes.get_lines() if line.get_marker() == "o" for x in line.get_xdata()]
    assert drawn == [1, 1, 2, 2, 4, 4, 8, 8, 16]
