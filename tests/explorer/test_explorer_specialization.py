"""Who visits which expert, against the evaluation's tables and cases one can foresee."""

import math

import pytest
import torch

from nano_moe.errors import UserError
from nano_moe.evaluation import evaluate
from nano_moe.explorer import specialization as module
from nano_moe.explorer.documents import finish
from nano_moe.explorer.passages import passage


def test_over_a_whole_split_it_says_what_the_evaluation_says(opened, monkeypatch):
    one = opened("routed")
    whole = len(one.corpus.val) // 48 * 48
    short = one.corpus.val.__class__(
        one.corpus.val.tokens[:whole],
        *(getattr(one.corpus.val, name) for name in ("starts", "domain_ids", "n_bytes")),
    )
    object.__setattr__(one.corpus, "val", short)  # no short last window
    found = finish(one.specialization())
    scored = evaluate(one.model, one.corpus, batch_size=4, precision="fp32")
    assert found["tokens"] == found["of"] == whole
    for spread, row in zip(found["layers"], scored.routing, strict=True):
        assert spread["layer"] == row["layer"]
        table = torch.tensor(spread["domains"])
        assert (table.sum(0) / table.sum()).tolist() == pytest.approx(row["load"])
        assert [e["share"] for e in spread["experts"]] == pytest.approx(row["load"], abs=1e-5)
        bits = {one["attribute"]: one["bits"] for one in spread["information"]}
        assert bits["domain"] == pytest.approx(row["domain_information"], abs=1e-4)
        assert bits["token"] == pytest.approx(row["token_information"], abs=1e-4)
        assert bits["kind"] <= bits["token"] + 1e-4  # a token has one kind
        assert spread["entropy"] == pytest.approx(row["load_entropy"] * 2, abs=1e-3)
        assert torch.tensor(spread["kinds"]).sum(0).tolist() == table.sum(0).tolist()


def test_a_hash_tells_everything_by_the_token_and_its_experts_are_faithful(opened):
    one = opened("hashed")
    for layer, spread in enumerate(finish(one.specialization())["layers"]):
        bits = {i["attribute"]: i for i in spread["information"]}
        # Top-2: the token leaves open which of its two experts an assignment goes to, one bit.
        assert bits["token"]["bits"] == pytest.approx(spread["entropy"] - 1, abs=1e-3)
        assert bits["token"]["control"] < 0.5 * bits["token"]["bits"]
        table = one.model.routers[layer].table
        for number, expert in enumerate(spread["experts"]):
            for text, share in expert["keenest"]:
                if len(text) == 1:
                    assert number in table[ord(text)] and share == 0.5
            counts = [n for _, n in expert["most"]]
            assert counts == sorted(counts, reverse=True) and counts[0] > 0


def test_the_control_of_a_model_that_knows_the_domain_is_far_below_it():
    domains = torch.arange(2).repeat_interleave(32).unsqueeze(1).expand(64, 10)
    ids = domains.reshape(-1, 1)
    table = module.joint(domains.flatten(), ids, (2, 2))
    found = module._information("domain", domains, ids, table)
    assert found["bits"] == 1
    # One degree of freedom over 64 windows; over 640 tokens it would be a tenth of that.
    assert found["control"] == pytest.approx(1 / (2 * math.log(2) * 64), rel=0.8)


def test_work_pauses_between_batches_and_is_bounded(opened, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 48 * 6)
    monkeypatch.setattr(module, "BATCH", 48 * 2)
    parts = opened("routed").specialization()
    pauses = 0
    try:
        while True:
            next(parts)
            pauses += 1
    except StopIteration as end:
        assert end.value["tokens"] == 48 * 6 < end.value["of"]
    assert pauses == 3


def test_what_sees_the_future_and_what_is_dense_is_refused(opened):
    with pytest.raises(UserError, match="sees the future"):
        finish(opened("choosing").specialization())
    with pytest.raises(UserError, match="dense run"):
        finish(opened("dense").specialization())


def test_passages_lie_within_their_domain_and_begin_where_a_line_does(opened):
    one = opened("routed")
    corpus, split = one.corpus, one.corpus.val
    tokens, firsts = split.tokens.tolist(), set()
    for domain in range(len(corpus.domains)):
        for number in range(20):
            ids = passage(corpus, domain, number, 48)
            assert 1 <= len(ids) <= 47 and corpus.tokenizer.end_id not in ids
            assert ids == passage(corpus, domain, number, 48)
            starts = [
                i
                for i in range(len(tokens))
                if tokens[i : i + len(ids)] == ids
                and split.domains_of_tokens(i, i + len(ids)).tolist() == [domain] * len(ids)
            ]
            assert starts
            if domain == 0:  # its lines are short
                before = {tokens[i - 1] for i in starts if i}
                assert 0 in starts or before & {ord("\n"), corpus.tokenizer.end_id}
                assert ids[0] != ord("\n")
            firsts.add(tuple(ids))
    assert len(firsts) > 10
    first = passage(corpus, 0, 0, 48)
    assert first == tokens[split.starts[split.domain_ids == 0][0] :][: len(first)]


def test_a_domain_without_validation_text_has_no_passages(opened):
    one = opened("routed")
    only = one.corpus.val.domain_ids * 0 + 1
    object.__setattr__(one.corpus.val, "domain_ids", only)
    assert [domain["number"] for domain in one.passages()["domains"]] == [1]
    with pytest.raises(UserError, match="choose another"):
        one.passage(0, 0)


def test_a_passage_is_a_trace_of_its_domain_and_there_is_an_end_to_them(opened):
    one = opened("routed")
    found = one.passage(1, 0)
    assert found["domain"] == one.corpus.domains[1] and found["cut"] == 0
    assert math.isfinite(sum(found["nats"]))
    for domain, number in ((1, 50), (2, 0), (1, -1)):
        with pytest.raises(UserError, match="choose another"):
            one.passage(domain, number)
