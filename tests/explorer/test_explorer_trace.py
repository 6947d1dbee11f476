"""What the page is told of a text, against the decoder's own answers.

Shapes: T inputs, E experts, K top_k.
"""

import math

import pytest
import torch

from nano_moe.explorer.trace import texts
from nano_moe.model.moe import MoE
from nano_moe.text.tokenizer import ByteTokenizer, CharTokenizer

TEXT = "wave 7 stone"


def inputs_of(one, text):
    return torch.tensor([[one.tokenizer.end_id, *one.tokenizer.encode(text)]])


def test_a_trace_is_what_the_decoder_decides(opened):
    one = opened("routed")
    found = one.route(TEXT)
    with torch.no_grad():
        logits, routings = one.model(inputs_of(one, TEXT))
    assert "".join(found["tokens"]) == TEXT and found["cut"] == 0
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    for layer in found["layers"]:
        routing = routings[layer["layer"]]
        assert layer["chosen"] == routing.ids[1:].tolist()
        for name in ("probs", "weights"):
            exact = getattr(routing, name)[1:]
            assert torch.tensor(layer[name]) == pytest.approx(exact, abs=6e-5)
        assert layer["bias"] is None and layer["dropped"] is None
    log_p = logits[0].double().log_softmax(-1)
    exact = [-log_p[i, token].item() for i, token in enumerate(inputs_of(one, TEXT)[0, 1:])]
    assert found["nats"] == pytest.approx(exact, abs=6e-4)


def test_a_text_longer_than_the_context_is_cut_and_says_so(opened):
    found = opened("routed").route("x" * 100)
    assert len(found["tokens"]) == 47 == len(found["layers"][0]["chosen"]) == len(found["nats"])
    assert found["cut"] == 53


def test_an_empty_text_is_no_token(opened):
    found = opened("routed").route("")
    assert found["tokens"] == found["nats"] == found["layers"][0]["probs"] == []


def test_a_dense_run_has_no_layers_to_show_but_its_surprise(opened):
    found = opened("dense").route(TEXT)
    assert found["layers"] == [] and len(found["nats"]) == len(TEXT)


def test_dropped_are_those_that_training_would_drop(opened):
    one = opened("tight")
    text = "stone stone stone stone wave"
    layers = one.route(text)["layers"]
    inputs = []  # of each layer, as they are without drops in the layers before
    hooks = [
        block.ffn.register_forward_pre_hook(lambda module, args: inputs.append(args))
        for block in one.model.blocks
    ]
    one.model(inputs_of(one, text))
    for hook in hooks:
        hook.remove()
    total = 0
    for layer, block, given in zip(layers, one.model.blocks, inputs, strict=True):
        assert isinstance(block.ffn, MoE)
        kept = block.ffn.train()(*given)[1].kept[1:].tolist()
        rows = zip(layer["chosen"], kept, strict=True)
        expected = [[e for e, stays in zip(*row, strict=True) if not stays] for row in rows]
        assert layer["dropped"] == expected
        total += sum(map(len, expected))
    assert 0 < total < 2 * len(text)


def test_a_bias_is_told_and_may_choose_an_expert_that_is_not_the_likeliest(opened):
    layers = opened("lifted").route(TEXT)["layers"]
    passed_over = 0
    for layer in layers:
        assert layer["bias"] == [0.4, -0.4, 0.2, -0.2]
        for probs, chosen in zip(layer["probs"], layer["chosen"], strict=True):
            best = sorted(range(4), key=lambda e: -probs[e])[:2]
            passed_over += set(best) != set(chosen)
    assert passed_over


def test_where_experts_choose_a_token_has_any_number_of_them_and_no_surprise(opened):
    one = opened("choosing")
    found = one.route(TEXT)
    with torch.no_grad():
        _, routings = one.model(inputs_of(one, TEXT))
    assert found["nats"] is None
    for layer in found["layers"]:
        kept = routings[layer["layer"]].kept[1:]
        assert [sorted(chosen) for chosen in layer["chosen"]] == [
            row.nonzero().flatten().tolist() for row in kept
        ]
        assert all(weights == sorted(weights, reverse=True) for weights in layer["weights"])


def test_a_token_that_ends_inside_a_character_shows_its_bytes():
    tokenizer = ByteTokenizer()
    said = texts(tokenizer, [*tokenizer.encode("é!"), tokenizer.end_id, 0x85, 0xE2])
    assert said == ["⟨c3⟩", "é", "!", "⟨end⟩", "⟨85⟩", "⟨e2⟩"]
    characters = CharTokenizer("ab")
    assert texts(characters, characters.encode("a?b")) == ["a", "�", "b"]


def test_the_same_text_is_routed_once(opened, monkeypatch):
    one = opened("routed")
    calls = []
    forward = one.model.forward
    monkeypatch.setattr(one.model, "forward", lambda *a: calls.append(a) or forward(*a))
    assert one.route(TEXT) is one.route(TEXT)
    assert len(calls) == 1


def test_logits_that_are_not_finite_leave_valid_json(opened):
    one = opened("routed")
    with torch.no_grad():
        one.model.blocks[1].ffn.router.weight.fill_(math.nan)
    for layer in one.route(TEXT)["layers"]:
        assert all(math.isfinite(p) for row in layer["probs"] for p in row)
