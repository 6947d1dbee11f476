"""The parent's end: faults of sides, the choice of the fastest, the table; with made-up workers."""

from __future__ import annotations

import os
import sys

import pytest

from nano_moe.bench import peers
from nano_moe.bench.peer_process import Peer, PeerFault
from nano_moe.bench.timing import Spread
from nano_moe.errors import UserError

# Takes as many seconds a step as its choices say; may have a fault, or die, on request.
FAKE = """
import json, os, sys
job = json.loads(sys.argv[1])
if job["side"] == "absent":
    import no_such_library
print(json.dumps({"parameters": job.get("parameters", 7), "name": "fake 1.0",
      "choices": job.get("choices", {}), "refused": {}}), flush=True)
used = {}
for line in sys.stdin:
    request, answer = json.loads(line), {}
    if "use" in request:
        used = request["use"]
    else:
        costs = [job["costs"].get(value, 0) for value in used.values()]
        if "faulty" in used.values():
            answer = {"fault": "RuntimeError: not here"}
        elif "deadly" in used.values():
            print("about to go\\nout of memory", file=sys.stderr)
            os._exit(3)
        else:
            answer = {"seconds": [job["pace"] + sum(costs)] * request["steps"], "loss": 1.0}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE, encoding="utf-8")
    return path


@pytest.fixture
def start(worker):
    """Starts a made-up side."""
    started = []

    def start(side, **job):
        job = {"pace": 1.0, "costs": {}, **job}
        started.append(Peer(side, sys.executable, job, worker))
        return started[-1]

    yield start
    for peer in started:
        peer.__exit__()


def test_a_side_tells_of_itself_then_takes_steps(start):
    peer = start("ours", pace=0.25)
    assert peer.wait()["name"] == "fake 1.0"
    peer.use("fp32", {})
    assert peer.steps(3) == [0.25] * 3


def test_a_fault_is_one_line_and_the_side_goes_on(start):
    peer = start("transformers")
    peer.wait()
    peer.use("fp32", {"experts": "faulty"})
    with pytest.raises(PeerFault, match="^RuntimeError: not here$"):
        peer.steps(1)
    peer.use("fp32", {"experts": "good"})
    assert peer.steps(1) == [1.0]


def test_a_side_that_dies_says_its_last_words(start):
    peer = start("litgpt")
    peer.wait()
    peer.use("fp32", {"experts": "deadly"})
    with pytest.raises(
        PeerFault, match="^its process ended with status 3: out of memory$"
    ) as fault:
        peer.steps(1)
    assert fault.value.side == "litgpt"
    with pytest.raises(PeerFault, match="status 3"):
        peer.use("fp32", {})


def test_a_side_that_is_killed_names_the_signal(start):
    peer = start("litgpt")
    peer.wait()
    peer.process.kill()
    with pytest.raises(PeerFault, match="^its process was killed by signal 9"):
        peer.steps(1)


def test_a_library_that_is_absent(start):
    with pytest.raises(PeerFault, match="No module named 'no_such_library'"):
        start("absent").wait()


def test_leaving_ends_the_process(start):
    with start("ours") as peer:
        peer.wait()
    assert peer.process.returncode is not None
    assert peer.errors.closed  # and leaving a second time, as the fixture does, is nothing


def test_a_peer_is_left_at_the_fastest_of_its_choices(start):
    choices = {"experts": ["faulty", "a", "slow", "b"], "attention": ["c", "d"]}
    costs = {"a": 0.2, "b": 0.1, "slow": 90.0, "c": 0.3, "d": 0.4}
    peer = start("transformers", choices=choices, costs=costs)
    about = peer.wait()
    rows = {row["choice"]: row for row in peers.try_choices(peer, about, "fp32", quick=False)}
    assert {c for c, row in rows.items() if row["taken"]} == {"experts=b", "attention=c"}
    assert peer.steps(1) == [pytest.approx(1.4)]
    assert rows["experts=b"]["ms"] == pytest.approx([1400] * 3)
    assert rows["experts=faulty"]["ms"] is None
    assert rows["experts=faulty"]["because"] == "RuntimeError: not here"
    assert rows["experts=slow"]["because"] == "61 times slower in fp32"
    again = {row["choice"]: row for row in peers.try_choices(peer, about, "bf16", quick=False)}
    assert again["experts=slow"]["because"] == "61 times slower in bf16"  # it was tried again


@pytest.fixture
def contest(monkeypatch, worker):
    """`compare` of one shape with made-up workers: side -> what its job says."""

    def run(quick=True, **jobs):
        def fake(side, python, job):
            return Peer(side, sys.executable, {"pace": 1.0, "costs": {}, **jobs[side]}, worker)

        monkeypatch.setattr(peers, "Peer", fake)
        interpreters = {side: sys.executable if side in jobs else None for side in SIDES}
        with peers.contest(peers.SHAPES[2], interpreters, quick) as entered:
            peers.choose(entered, "fp32", quick)
            return {row["peer"].split()[0]: row for row in peers.compare(entered, "fp32", quick)}

    return run


SIDES = ("ours", "transformers", "litgpt")


def test_ratios_are_of_throughput_and_meet_their_target_from_it_on(contest):
    rows = contest(ours={"pace": 1.0}, transformers={"pace": 1.1}, litgpt={"pace": 1.1})
    ours, theirs = rows["fake"]["ours tokens/s"], rows["fake"]["peer tokens/s"]
    assert ours == 32 and theirs == 29  # 2 x 16 tokens a step


def test_a_shape_has_its_own_targets(contest):
    fake, timings = {"name": "fake"}, {"ours": [1.0], "transformers": [1.1], "litgpt": [1.1]}
    recipe = peers.recipes.recipe("64 experts top-8", quick=True)
    entered = peers.Contest(peers.SHAPES[2], recipe)
    entered.sides = dict.fromkeys(timings)
    entered.about = dict.fromkeys(timings, fake)
    rows = [
        peers.row_of(entered, side, "fp32", peers.Timings(timings))
        for side in ("transformers", "litgpt")
    ]
    assert [row["ours / peer"] for row in rows] == [Spread(1.1, 1.1, 1.1)] * 2
    assert [(row["target"], row["met"]) for row in rows] == [(1.2, False), (1.0, True)]


def test_without_an_interpreter_the_row_says_how_to_get_one(contest):
    row = contest(ours={}, transformers={})["litgpt"]
    assert "litgpt-env/bin/pip install torch==" in row["not measured"]
    assert row["ours / peer"] is None and row["met"] is None and row["ours tokens/s"] == 32


def test_a_peer_that_dies_is_not_measured_and_the_others_are(contest):
    deadly = {"choices": {"experts": ["deadly"]}}
    row = contest(ours={}, transformers=deadly, litgpt={})["transformers"]
    assert row["not measured"] == "its process ended with status 3: out of memory"


def test_our_own_side_must_not_fail(contest):
    with pytest.raises(UserError, match="our own side failed: its process ended with status 3"):
        contest(ours={"choices": {"experts": ["deadly"]}}, transformers={}, litgpt={})


def test_different_parameter_counts_are_no_contest(contest):
    with pytest.raises(AssertionError, match="parameters differ"):
        contest(ours={}, transformers={"parameters": 8}, litgpt={})


def test_an_interpreter_that_is_none_is_the_users_fault():
    with pytest.raises(UserError, match="^--litgpt-python /no/python: no such program; litgpt"):
        peers.peers(quick=True, litgpt_python="/no/python")


@pytest.mark.parametrize("other", ["false", "true"])
def test_an_interpreter_without_litgpt_is_told_what_to_install(tmp_path, other):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{other}\n", encoding="utf-8")
    python.chmod(0o755)
    if other == "true":
        peers.check_litgpt(str(python))
        return
    with pytest.raises(UserError, match="no Python that has litgpt; run: .* pip install litgpt=="):
        peers.check_litgpt(str(python))


@pytest.mark.slow
@pytest.mark.skipif("LITGPT_PYTHON" not in os.environ, reason="LITGPT_PYTHON names no interpreter")
def test_litgpt_is_measured_where_it_is():
    report = peers.peers(quick=True, litgpt_python=os.environ["LITGPT_PYTHON"])
    rows = [row for row in report.rows if "not measured" in row]
    assert len(rows) == len(peers.SHAPES) * 2 * 2
    assert all(row["not measured"] is None for row in rows)
