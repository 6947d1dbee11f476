"""Sample a continuation, token by token, as text that streams.

Shapes: T time, V vocabulary.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nano_moe.errors import UserError
from nano_moe.model.gpt import GPT
from nano_moe.text.tokenizer import Tokenizer


def next_token_probabilities(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Logits (V,) to the distribution to draw from (V,): temperature, then top-k, then top-p.

    Temperature 0 puts everything on the likeliest token. Top-p keeps the smallest set of
    likeliest tokens whose mass reaches `top_p` (Holtzman et al. 2020, eq. 2-3).
    """
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite; this run diverged, use another")
    logits = logits.double()  # so that a tiny temperature or top-p does not round to 0
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    ranked, order = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    ranked = ranked.softmax(-1)
    if top_k is not None:
        ranked[top_k:] = 0
    before = ranked.cumsum(-1) - ranked
    ranked[before >= top_p * ranked.sum()] = 0
    return torch.zeros_like(logits).index_copy_(0, order, ranked / ranked.sum())


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Yield pieces of text as they are sampled, until an end token or `max_tokens`.

    An empty prompt starts a new document. The window slides when the context is full. Raises
    UserError for a model that sees the future.
    """
    model.config.check_causal()
    shape = functools.partial(
        next_token_probabilities, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return _pieces(model, tokenizer, prompt, max_tokens, shape, seed)


@torch.no_grad()
def _pieces(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    probabilities_of: Callable[[Tensor], Tensor],
    seed: int,
) -> Iterator[str]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_id, *(int(i) for i in tokenizer.encode(prompt))]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _ in range(max_tokens):
        window = torch.tensor([ids[-model.config.context :]], device=device)
        logits = model(window)[0][0, -1, : tokenizer.n_vocab].cpu()
        token = int(torch.multinomial(probabilities_of(logits), 1, generator=generator))
        if token == tokenizer.end_id:
            break
        ids.append(token)
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def check_sampling(
    *, max_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int
) -> None:
    """Raises UserError for settings that no distribution fits."""
    if max_tokens < 1:
        raise UserError(f"--tokens {max_tokens}: ask for at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k {top_k}: must be at least 1")
    if abs(seed) >= 2**63:
        raise UserError(f"--seed {seed}: must fit 64 bits")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0 and at most 1")
