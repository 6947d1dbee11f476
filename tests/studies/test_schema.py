"""What a study file may say, and what its rule is made of."""

import pytest

from nano_moe.errors import UserError
from nano_moe.studies import schema

TREND = "  trends:\n    - says: t\n      per: x\n      smallest_effect: 1\n      lines: [{1: "
GRID = "  grid: {field: optim.lr, values: [0.1, 0.2, 0.3, 0.4]}\n  members:"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("better: sparse", "better: spars", "no member 'spars'; there are dense, sparse"),
        ("than: dense", "than: sparse", "is the same member"),
        ("[1, 2]", "[1, 1]", "a seed is named twice"),
        ("[1, 2]", "[]", "study.seeds: must have at least 1 of them"),
        ("warmup_steps: 0", "warmup_steps: [0]", "warmup_steps: must be a single value"),
        ("warmup_steps: 0", "warmup_steps: .inf", "warmup_steps: must be a finite number"),
        ("smallest_effect: 0.02", "smallest_effect: 0", "smallest_effect"),
        ("question: Does it pay?", "questions: Does it pay?", "did you mean 'question'"),
        ("  claim: It does.\n", "", "claim"),
        ("equal: [tokens, active]", "equal: [token]", "equal"),
        ("than: dense", "than: dense\n      figure: memory_gb", "'sparse' has no memory_gb"),
        ("  members:", GRID, "not both"),
        ("  members:", "  step_times: {spars: 1}\n  members:", "no member 'spars'"),
        ("study:", "studies:", "not a study"),
        ("than: dense", "than: dense\n      figure: cee", "no figure 'cee'; there are ce,"),
        ("than: dense", "than: dense\n      figure: ce_prefix", "'sparse' has no ce_prefix"),
        ("  comparisons:", f"{TREND}a, 2: b, 4: dense}}]\n  comparisons:", "no member 'a'"),
        ("  comparisons:", f"{TREND}dense, 2: sparse}}]\n  comparisons:", "three points"),
        ("fields: {model.d_ff", "seeds: [3], fields: {model.d_ff", "seed that the study has not"),
        ("  members:", "  figure: trend\n  members:", "there is none"),
        ("  members:", "  figure: leak\n  members:", "no member has; set look: leak"),
        ("fields: {model.d_ff", "expert_budget: 25%, fields: {model.d_ff", "set measure: true"),
        (
            "sparse:\n",
            "sparse:\n      measure: true\n      expert_budget: 64MB\n",
            "'64MB' is no share of the experts; give all, or such as 25%",
        ),
        (
            "sparse:\n",
            "sparse:\n      measure: true\n      expert_budget: 25%\n",
            "'sparse' has no ce; it has memory_gb",
        ),
        ("  members:", "  figure: memory\n  members:", "set measure: true"),
        ("  members:", "  figure: grid\n  members:", "grid is for a grid"),
        ("optim.warmup_steps: 0", "seed: 3", "seeds are the study's own"),
        ("optim.warmup_steps: 0", "trainer.save_every: 5", "is the same in every study; drop it"),
        ("title: Does it pay", "title: Does it | pay", "must be one line of words"),
        ("title: Does it pay", 'title: "Does it\\npay"', "must be one line of words"),
        ("model.d_ff: 384", "seed: 3", "seeds are the study's own"),
        (
            "than: dense",
            "than: dense\n      figure: dead_experts\n      relative: true",
            "dead_experts may be 0, which has no factor",
        ),
        (
            "  comparisons:",
            "  recovered: {base: dense, part: sparse, whole: big}\n  comparisons:",
            "no member 'big'",
        ),
        ("fields: {model.d_ff", "expert_ranks: 2, fields: {model.d_ff", "set measure: true"),
        (
            "sparse:\n",
            "sparse:\n      measure: true\n      expert_ranks: 2\n",
            "'sparse' has no ce; it has exchange_bytes",
        ),
        ("fields: {model.d_ff", "start_from: dens, fields: {model.d_ff", "no member 'dens'"),
    ],
)
def test_faults_are_one_line_with_the_file(written, old, new, message):
    with pytest.raises(UserError, match=message) as fault:
        schema.load(written((old, new)))
    assert "study.yaml" in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("[0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.2, 0.4]")], "must rise, each value named once"),
        ([("[0.1, 0.2, 0.3, 0.4]", "[0.4, 0.3, 0.2, 0.1]")], "must rise"),
        ([("[1]", "[1, 2]")], "a grid has one seed"),
        ([("  figure: grid\n", "")], "grid is for a grid"),
        ([("  members:", "  timed: [dense]\n  members:")], "drop trends, timed"),
        ([("dense: {", "dense: {measure: true, ")], "trained from nothing"),
    ],
)
def test_faults_of_a_grid_are_told_before_it_runs(written, changes, message):
    path = written(("  members:", f"  figure: grid\n{GRID}"), ("[1, 2]", "[1]"))
    text = path.read_text().partition("  comparisons:")[0]
    path.write_text(text)
    schema.load(path)
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        schema.load(path)


def test_members_that_are_compared_share_a_seed(written):
    apart = [("dense: {", "dense: {seeds: [1], "), ("sparse:\n", "sparse:\n      seeds: [2]\n")]
    with pytest.raises(UserError, match="sparse, dense have no seed in common"):
        schema.load(written(*apart))


def test_experts_are_shared_out_or_left_on_disk_and_not_both(written):
    ranks = "sparse:\n      measure: true\n      expert_ranks: 2\n"
    figures = ("than: dense", "than: sparse\n      figure: rest_ms\n      than_figure: step_ms")
    assert schema.load(written(("sparse:\n", ranks), figures)).members["sparse"].expert_ranks == 2
    with pytest.raises(UserError, match="drop expert_budget"):
        schema.load(written(("sparse:\n", f"{ranks}      expert_budget: 25%\n"), figures))


def test_the_rule_is_all_that_decides_and_none_of_the_words(written):
    rule = schema.load(written()).rule
    for old, new in (("study:\n", "study:\n  caveats: [small]\n"), ("Does it pay?", "Does it?")):
        assert schema.load(written((old, new))).rule == rule
    for old, new in (
        ("0.02", "0.01"),
        ("[1, 2]", "[1, 3]"),
        ("n_experts: 16", "n_experts: 32"),
        ("warmup_steps: 0", "warmup_steps: 1"),
        ("[tokens, active]", "[tokens]"),
        ("It does.", "It does not."),
    ):
        assert schema.load(written((old, new))).rule != rule, new
