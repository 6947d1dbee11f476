"""Generating, and what the experts did for each token on its way.

Sampling itself is `inference.generate`; here the routers are listened to while it runs.
"""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nano_moe.explorer.contract import Choice, Settings, Step
from nano_moe.explorer.trace import last_choice, token_text
from nano_moe.inference.generate import check_sampling, generate
from nano_moe.model.gpt import GPT
from nano_moe.model.routing import Routing
from nano_moe.text.tokenizer import Tokenizer


class Listener:
    """Each newest token that the model reads within `hear`, and what its sparse layers decide."""

    def __init__(self, model: GPT):
        self.heard: list[tuple[int, list[Choice]]] = []
        self.listens = False
        sparse = [n for n in range(model.config.n_layers) if model.config.is_sparse(n)]
        self.handles = [model.embedding.register_forward_hook(self._read)]
        for layer, router in zip(sparse, model.routers, strict=True):
            self.handles.append(router.register_forward_hook(self._decided(layer)))

    def hear(self, pieces: Iterator[str]) -> tuple[bool, list[tuple[int, list[Choice]]]]:
        """Let one piece be sampled: whether there was one, and what was read meanwhile."""
        self.heard, self.listens = [], True
        try:
            return next(pieces, None) is not None, self.heard
        finally:
            self.listens = False

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _read(self, module: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
        if self.listens:
            self.heard.append((int(inputs[0][0, -1]), []))

    def _decided(self, layer: int) -> Callable[[Any, Any, Routing], None]:
        def hook(module: Any, inputs: Any, routing: Routing) -> None:
            if self.listens:
                self.heard[-1][1].append(last_choice(layer, routing))

        return hook


def steps(model: GPT, tokenizer: Tokenizer, prompt: str, settings: Settings) -> Iterator[Step]:
    """Continue a prompt; each token comes once the model has read it and its routing is known.

    To that end one token more is drawn than is shown. Raises UserError for a model that sees the
    future and for settings that no distribution fits.
    """
    most, seed = settings["tokens"] + 1, settings["seed"]
    temperature, top_p = settings["temperature"], settings["top_p"]
    check_sampling(max_tokens=most, temperature=temperature, top_k=None, top_p=top_p, seed=seed)
    pieces = generate(
        model, tokenizer, prompt, max_tokens=most, temperature=temperature, top_p=top_p, seed=seed
    )
    return _listened(model, tokenizer, pieces)


def _listened(model: GPT, tokenizer: Tokenizer, pieces: Iterator[str]) -> Iterator[Step]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    prompt, more = True, True
    with contextlib.closing(Listener(model)) as listener:
        begun = time.perf_counter()
        while more:
            more, heard = listener.hear(pieces)
            for token, choices in heard[1:] if prompt else heard:
                seconds = round(time.perf_counter() - begun, 4)
                text = token_text(tokenizer, token, decoder)
                yield {"token": text, "seconds": seconds, "choices": choices}
            prompt = prompt and not heard
