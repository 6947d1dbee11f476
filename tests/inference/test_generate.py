"""Sampling: the distribution that is drawn from, and the text that streams from the draws."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nano_moe.config import ModelConfig, MoEConfig
from nano_moe.errors import UserError
from nano_moe.inference import sampling
from nano_moe.inference.generate import check_sampling, generate, generate_all
from nano_moe.model.gpt import GPT, init_weights
from nano_moe.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

END = ByteTokenizer().end_id
CONFIG = ModelConfig(
    vocab_size=264,
    context=12,
    n_layers=2,
    d_model=16,
    n_heads=2,
    d_ff=32,
    init_std=0.5,  # wide, so that likelihoods differ
    moe=MoEConfig(n_experts=4, top_k=2),
)


@pytest.fixture(scope="module")
def model():
    return init_weights(GPT(CONFIG), seed=3).eval()


class Says(nn.Module):
    """A model that puts everything on the tokens of a script, one after the other."""

    def __init__(self, script: list[int], vocab: int = 264):
        super().__init__()
        self.script, self.vocab, self.config = iter(script), vocab, CONFIG
        self.seen: list[list[int]] = []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens, cache):
        cache.read(tokens.shape[1])
        self.seen.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], self.vocab)
        logits[0, -1, next(self.script)] = 100.0
        return logits, []


def draw(model, prompt: str = "ab", **settings) -> list[str]:
    settings = {"max_tokens": 30} | settings
    return list(generate(model, ByteTokenizer(), prompt, **settings))


def distribution(logits, temperature=1.0, top_k=None, top_p=1.0) -> torch.Tensor:
    cut = {"top_k": top_k, "top_p": top_p}
    return sampling.next_token_probabilities(logits[None], temperature=temperature, **cut)[0]


# Apart from one another, so that rounding decides no order.
LOGITS = st.lists(st.integers(-16, 16).map(lambda n: n / 2), min_size=1, max_size=9, unique=True)


# --- the distribution ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.1, 5))
def test_temperature_divides_the_logits(values, temperature):
    logits = torch.tensor(values)
    expected = (logits.double() / temperature).softmax(-1)
    torch.testing.assert_close(
        distribution(logits, temperature).double(), expected, rtol=1e-3, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest_and_their_proportions(values, k):
    logits = torch.tensor(values)
    kept = sorted(range(len(values)), key=lambda i: -values[i])[:k]
    expected = torch.zeros(len(values), dtype=torch.float64)
    expected[kept] = logits[kept].double().softmax(-1)
    torch.testing.assert_close(distribution(logits, top_k=k), expected, rtol=1e-3, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.floats(0.05, 1), st.integers(1, 12))
def test_top_p_keeps_the_smallest_set_that_reaches_it(values, p, k):
    """By search over all sizes; of the top k, when that is given too."""
    logits = torch.tensor(values)
    probabilities = distribution(logits, top_k=k).double()
    order = probabilities.argsort(descending=True).tolist()
    mass = probabilities[order].cumsum(0)
    assume((mass - p).abs().min() > 1e-5)  # rounding decides nothing
    smallest = next((n for n in range(1, len(values) + 1) if mass[n - 1] >= p), len(values))
    expected = torch.zeros(len(values), dtype=torch.float64)
    kept = order[:smallest]
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    found = distribution(logits, top_k=k, top_p=p)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    assert (found > 0).tolist() == (expected > 0).tolist()


def test_equal_likelihoods_are_cut_to_as_many_as_are_needed():
    assert (distribution(torch.zeros(8), top_p=0.5) > 0).sum() == 4
    assert (distribution(torch.zeros(8), top_k=3) > 0).sum() == 3
    one_above = distribution(torch.tensor([1.0, 2.0, 1.0, 1.0]), top_k=2)
    assert (one_above > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-30])
def test_the_coldest_draw_is_the_likeliest_token(temperature):
    logits = torch.tensor([1.0, 30.0, -1e4, 29.0])
    found = distribution(logits, temperature)
    assert found.tolist() == [0, 1, 0, 0]


def test_bfloat16_logits_are_drawn_from_in_float64():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert distribution(logits).dtype == torch.float64
    assert torch.equal(distribution(logits), distribution(logits.float()))


def test_draws_follow_the_distribution():
    """A thousand one-token continuations; each share within five standard errors."""

    class Fixed(Says):
        def forward(self, tokens, cache):
            cache.read(tokens.shape[1])
            logits = torch.full((1, tokens.shape[1], 264), -1e9)
            logits[0, -1, [65, 66, 67]] = torch.tensor([0.5, 0.3, 0.2]).log()
            return logits, []

    text = "".join(draw(Fixed([]), max_tokens=1000, temperature=1.0, top_p=1.0))
    for letter, share in (("A", 0.5), ("B", 0.3), ("C", 0.2)):
        assert abs(text.count(letter) - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5


# --- the text ------------------------------------------------------------------------------------


def uncached(model, ids, steps):
    """Greedy, every token from a forward pass over all before it; half the context when full."""
    window = list(ids)
    for _ in range(steps):
        if len(window) > CONFIG.context:
            window = window[-(CONFIG.context // 2) :]
        window.append(int(model(torch.tensor([window]))[0][0, -1, :257].argmax()))
        yield window[-1]
        if window[-1] == END:
            return


def test_greedy_takes_the_likeliest_token_each_time_also_past_the_context(model):
    ids = list(uncached(model, [END, *b"ab"], 30))
    assert len(ids) > CONFIG.context
    expected = ByteTokenizer().decode([i for i in ids if i != END])
    for seed in range(2):
        assert "".join(draw(model, temperature=0, seed=seed)) == expected
        assert "".join(draw(model, top_k=1, temperature=2.0, seed=seed)) == expected
    assert "".join(draw(model, top_p=1e-6, temperature=2.0)) == expected


def test_prompts_drawn_together_say_what_each_says_alone(model):
    prompts = ["ab", "", "a longer one that fills the context", "x"]
    settings = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    together = [""] * 4
    for row, piece in generate_all(model, ByteTokenizer(), prompts, seed=5, **settings):
        together[row] += piece
    alone = ["".join(draw(model, p, seed=5 + row, **settings)) for row, p in enumerate(prompts)]
    assert together == alone and len(set(together)) == 4


def test_a_seed_repeats_and_another_differs(model):
    first, again, other = ("".join(draw(model, temperature=1.5, seed=s)) for s in (7, 7, 8))
    assert first == again != other
    torch.manual_seed(0)
    assert "".join(draw(model, temperature=1.5, seed=7)) == first
    assert torch.initial_seed() == 0  # nor is the global generator touched


def test_each_token_is_read_once_and_half_the_context_again_when_it_is_full():
    says = Says([*range(40, 70)])
    draw(says, "ab", max_tokens=20)
    everything = [END, *b"ab", *range(40, 60)]
    ones = [[token] for token in everything]
    first = [everything[:3], *ones[3:12]]
    again = [everything[7:13], *ones[13:19], everything[14:20]]  # the 13th token finds 12 places
    assert says.seen == [*first, *again, *ones[20:22]]


def test_a_prompt_longer_than_the_context_keeps_its_end():
    says = Says([65])
    draw(says, "0123456789abcdefghij", max_tokens=1)
    assert says.seen == [[*b"89abcdefghij"]]


def test_an_empty_prompt_starts_a_document():
    says = Says([65, END])
    assert "".join(draw(says, "")) == "A"
    assert says.seen[0] == [END]


def test_it_stops_at_the_end_token_and_never_beyond_the_number_asked_for():
    assert "".join(draw(Says([65, 66, END, 67]))) == "AB"
    assert "".join(draw(Says([65] * 99), max_tokens=7)) == "A" * 7


def test_pieces_come_while_they_are_drawn():
    says = Says([65, 66, 67])
    pieces = generate(says, ByteTokenizer(), "", max_tokens=3)
    assert next(pieces) == "A" and len(says.seen) == 1


@pytest.mark.parametrize("text", ["né 漢字 🦊 fin", "🦊", "e\u0301"])
def test_characters_of_several_bytes_come_whole(text):
    pieces = draw(Says([*text.encode(), END]), max_tokens=99)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_form_no_character_are_replaced_also_at_the_end():
    assert "".join(draw(Says([0xC3, 0x41, END]))) == "\ufffdA"
    assert "".join(draw(Says([0x41, 0xF0, 0x9F, END]))) == "A\ufffd"
    assert "".join(draw(Says([0x41, 0xC3, 0xA9]), max_tokens=2)) == "A\ufffd"


def test_pieces_join_to_the_text_for_every_tokenizer():
    text = "the fox — né 漢 " * 8
    bpe = BPETokenizer.train([text], 300)
    for tokenizer in (bpe, CharTokenizer.train([text]), ByteTokenizer()):
        script = [*tokenizer.encode(text), tokenizer.end_id]
        pieces = generate(Says(script, vocab=512), tokenizer, "", max_tokens=999)
        assert "".join(pieces) == text


def test_rows_of_the_embedding_that_no_token_uses_are_never_drawn():
    """vocab_size is rounded up; 264 rows, 257 tokens."""

    class Padded(Says):
        def forward(self, tokens, cache):
            logits, _ = super().forward(tokens, cache)
            logits[..., 257:] = 1e4
            return logits, []

    assert "".join(draw(Padded([65, 66, END]), temperature=1.0)) == "AB"


@pytest.mark.parametrize("n", [0, -3])
def test_settings_that_fit_no_distribution_are_refused(n):
    good = {"max_tokens": 1, "temperature": 1.0, "top_k": None, "top_p": 1.0, "seed": 0}
    check_sampling(**good)
    check_sampling(**good | {"temperature": 0, "top_k": 1})
    for bad in ({"max_tokens": n}, {"top_k": n}, {"top_p": n}, {"temperature": n - 0.1}):
        (name,) = bad
        option = {"max_tokens": "tokens"}.get(name, name).replace("_", "-")
        with pytest.raises(UserError, match=f"^--{option} "):
            check_sampling(**good | bad)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="--temperature"):
            check_sampling(**good | {"temperature": bad})
    with pytest.raises(UserError, match="^--seed "):
        check_sampling(**good | {"seed": 2**70})


@pytest.mark.parametrize("settings", [{"temperature": 1e-300}, {"top_p": 1e-300}])
def test_a_setting_too_small_for_float32_is_the_likeliest_token(settings):
    found = distribution(torch.tensor([0.0, 3.0, 2.0]), **settings)
    assert found.tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_logits_that_are_not_finite_are_refused(temperature, value):
    logits = torch.tensor([[0.0, 1.0], [0.0, float(value)]])
    dice = [torch.Generator(), torch.Generator()]
    with pytest.raises(UserError, match="diverged"):
        sampling.draw(logits, dice, temperature=temperature, top_k=None, top_p=1.0)


def test_greedy_takes_the_first_of_equals_and_no_number():
    logits = torch.tensor([[1.0, 3.0, 3.0, -9.0], [-2.0, -1.0, -5.0, -1.0]])
    assert sampling.likeliest(logits) == [1, 1] == sampling.likeliest(logits.repeat(1, 2)[:, :4])
    dice = torch.Generator().manual_seed(1)
    before = dice.get_state()
    drawn = sampling.draw(logits, [dice, dice], temperature=0, top_k=None, top_p=1.0)
    assert drawn == [1, 1] and torch.equal(dice.get_state(), before)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400), st.integers(0, 99), st.floats(0.1, 3), st.integers(1, 400),
    st.floats(0.02, 1),
)  # fmt: skip
def test_the_distribution_is_that_of_sorting(n, seed, temperature, k, p):
    """Against all tokens ranked in float64, at sizes that no vector divides."""
    logits = 4 * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    ranked, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    ranked[k:] = 0
    before = (ranked.cumsum(-1) - ranked) / ranked.sum()
    assume((before - p).abs().min() > 1e-6)  # rounding decides nothing
    ranked[before >= p] = 0
    expected = torch.zeros_like(ranked).scatter_(-1, order, ranked / ranked.sum())
    found = distribution(logits, temperature, k, p)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


def test_each_number_takes_the_token_whose_share_it_falls_in(monkeypatch):
    """Of a thousand even numbers, as many as its chance says; a token of chance 0 never."""
    logits = torch.tensor([0.5, 0.2, 1e-30, 0.3]).log().repeat(1000, 1)
    numbers = iter((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(numbers))
    drawn = sampling.draw(logits, [None] * 1000, temperature=1.0, top_k=3, top_p=1.0)
    assert [drawn.count(token) for token in range(4)] == [500, 200, 0, 300]
    assert drawn == sorted(drawn)
