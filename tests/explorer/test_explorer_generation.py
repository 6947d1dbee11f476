"""Generated tokens and their routing, against sampling itself and against routing the whole."""

import pytest
import torch

from nano_moe.errors import UserError
from nano_moe.explorer.generation import steps
from nano_moe.explorer.trace import texts
from nano_moe.inference.generate import generate
from nano_moe.text.tokenizer import Tokenizer

SETTINGS = {"tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 4}


def drawn(one, prompt="wave", **settings):
    return list(one.generate(prompt, {**SETTINGS, **settings}))


@pytest.mark.parametrize("name", ["routed", "lifted", "hashed", "dense"])
def test_the_text_is_that_of_sampling(opened, name):
    one = opened(name)
    found = drawn(one)
    assert len(found) == 12
    ids = heard_ids(one, "wave")[len("wave") :]
    assert [step["token"] for step in found] == texts(one.tokenizer, ids)
    seconds = [step["seconds"] for step in found]
    assert seconds == sorted(seconds)


def test_each_tokens_routing_is_that_of_the_text_up_to_it(opened):
    one = opened("routed")
    found = drawn(one, prompt="ab")
    ids = heard_ids(one, "ab")
    with torch.no_grad():
        _, routings = one.model(torch.tensor([[one.tokenizer.end_id, *ids]]))
    for i, step in enumerate(found):
        row = 1 + len("ab") + i
        assert [choice["layer"] for choice in step["choices"]] == [1, 2]
        for choice in step["choices"]:
            routing = routings[choice["layer"]]
            assert choice["chosen"] == routing.ids[row].tolist()
            assert choice["probs"] == pytest.approx(routing.probs[row].tolist(), abs=1e-3)
            assert choice["weights"] == pytest.approx(routing.weights[row].tolist(), abs=1e-3)


def heard_ids(one, prompt):
    """The tokens that sampling draws, as the model is shown them."""
    seen = []
    hook = one.model.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].tolist()))
    try:
        chosen = {"temperature": 0.9, "top_p": 0.95, "seed": 4}
        list(generate(one.model, one.tokenizer, prompt, max_tokens=13, **chosen))
    finally:
        hook.remove()
    return [token for read in seen for token in read][1:]


def test_beyond_the_context_the_window_slides_and_tokens_keep_coming(opened):
    assert len(drawn(opened("routed"), tokens=60, temperature=1.5, top_p=1.0)) > 47


def test_the_end_token_ends_it_and_the_token_before_is_shown(opened, monkeypatch):
    one = opened("routed")
    end = one.tokenizer.end_id
    script = iter([97, 98, end])
    monkeypatch.setattr("nano_moe.inference.generate.draw", lambda *a, **k: [next(script)])
    found = drawn(one)
    assert [step["token"] for step in found] == ["a", "b"]
    assert all(len(step["choices"]) == 2 for step in found)


def test_other_work_on_the_model_meanwhile_is_not_heard(opened):
    one = opened("routed")
    alone = drawn(one)
    beside = []
    for step in one.generate("wave", SETTINGS):
        one.route(f"something else {len(beside)}")
        beside.append(step)
    for step in (*alone, *beside):
        step["seconds"] = 0
    assert beside == alone


def test_nothing_listens_once_it_is_over_or_given_up(opened):
    one = opened("routed")
    drawn(one)
    given_up = one.generate("wave", SETTINGS)
    next(given_up)
    given_up.close()
    hooks = [module._forward_hooks for module in (one.model.embedding, *one.model.routers)]
    assert not any(hooks)


def test_what_sees_the_future_is_refused_in_one_line(opened):
    with pytest.raises(UserError, match="sees the future") as refused:
        opened("choosing").generate("wave", SETTINGS)
    assert "\n" not in str(refused.value)


def test_settings_are_those_of_sampling(opened):
    one = opened("dense")
    assert isinstance(one.tokenizer, Tokenizer)
    with pytest.raises(UserError, match="temperature"):
        steps(one.model, one.tokenizer, "a", {**SETTINGS, "temperature": -1.0})
