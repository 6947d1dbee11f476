"""Experts that stay on disk: at most a budget of them is in memory, the others come when called.

Shapes: N tokens, D d_model, K top_k, F hidden width, S slots.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_moe.config import Recipe
from nano_moe.errors import UserError
from nano_moe.inference.expert_file import ExpertFile, split_weights
from nano_moe.model.attention import rope_tables
from nano_moe.model.gpt import GPT
from nano_moe.model.moe import MoE
from nano_moe.model.ops import ACTIVATIONS
from nano_moe.model.router import Router
from nano_moe.model.routing import Routing, carried_out, scores_of
from nano_moe.runs import Run

Key = tuple[int, int]  # layer, expert
Policy = Literal["lru", "lfu"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Counts(NamedTuple):
    """Calls for an expert that was in memory or on its way there, or was not; guesses made.

    `waited`: hits that the disk had not yet brought. `guessed_right`: guesses that were called.
    """

    hits: int
    waited: int
    misses: int
    guessed: int
    guessed_right: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class ExpertStore:
    """S slots in memory for the experts of a file.

    A full store gives up the expert that was used longest ago ("lru"), or least often so far
    ("lfu"), but never one that is held. Guesses are read by a thread of their own.
    """

    def __init__(self, file: ExpertFile, slots: int, policy: Policy = "lru"):
        self.file, self.policy = file, policy
        first, down = file.shapes
        self.first, self.down = torch.empty(slots, *first), torch.empty(slots, *down)
        self.slots: OrderedDict[Key, int] = OrderedDict()  # in order of use, the latest last
        self.free = list(range(slots))
        self.uses: Counter[Key] = Counter()
        self.held: set[Key] = set()
        self.coming: dict[Key, Future[None]] = {}
        self._guesses: set[Key] = set()
        self._hits = self._waited = self._misses = self._guessed = self._right = 0
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, "experts")

    @property
    def counts(self) -> Counts:
        return Counts(self._hits, self._waited, self._misses, self._guessed, self._right)

    def count_anew(self) -> None:
        """From now on, and of guesses that are made from now on."""
        with self._lock:
            self._guesses.clear()
            self._hits = self._waited = self._misses = self._guessed = self._right = 0

    def get(self, key: Key) -> tuple[Tensor, Tensor]:
        """An expert's weights, (2F or F, D) and (D, F); it is held until it is let go."""
        with self._lock:
            self.held.add(key)
            self.uses[key] += 1
            known, coming = key in self.slots, self.coming.get(key)
            self._hits, self._misses = self._hits + known, self._misses + (not known)
            self._waited += coming is not None
            self._right += key in self._guesses
            self._guesses.discard(key)
            if known:
                self.slots.move_to_end(key)
        if coming is not None:
            coming.result()
        elif not known:
            self._make_room(key)
            self.file.read(*key, *self._at(key))
        return self._at(key)

    def _at(self, key: Key) -> tuple[Tensor, Tensor]:
        slot = self.slots[key]
        return self.first[slot], self.down[slot]

    def _make_room(self, key: Key) -> None:
        """A slot for a key, after the end of a guess's reading where all others are held."""
        while True:
            with self._lock:
                if self._take_slot(key):
                    return
                first_to_end = next(iter(self.coming.values()))
            first_to_end.result()

    def hold(self, keys: Iterable[Key]) -> None:
        """Do not give these up."""
        with self._lock:
            self.held.update(keys)

    def let_go(self, key: Key) -> None:
        """It may be given up again."""
        with self._lock:
            self.held.discard(key)

    def guess(self, keys: Sequence[Key]) -> None:
        """Begin to read those that are not in memory, with what room those held will leave."""
        with self._lock:
            for key in keys:
                awaited = sum(one not in self.slots for one in self.held)
                if key in self.slots or len(self.free) + len(self._idle()) <= awaited:
                    continue
                self._take_slot(key)
                self._guessed += 1
                self._guesses.add(key)
                self.coming[key] = self._reader.submit(self._read, key)

    def wait(self) -> None:
        """Until all that was guessed is read."""
        with self._lock:
            coming = list(self.coming.values())
        for one in coming:
            one.result()

    def _read(self, key: Key) -> None:
        self.file.read(*key, *self._at(key))
        with self._lock:
            del self.coming[key]

    def _take_slot(self, key: Key) -> bool:
        """Give a slot to a key, with the lock held; whether there was one."""
        idle = self._idle()
        if not self.free and not idle:
            return False
        if not self.free:
            out = idle[0] if self.policy == "lru" else min(idle, key=self.uses.__getitem__)
            self._guesses.discard(out)
            self.free.append(self.slots.pop(out))
        self.slots[key] = self.free.pop()
        return True

    def _idle(self) -> list[Key]:
        """What may be given up, that of the longest disuse first."""
        return [key for key in self.slots if key not in self.held and key not in self.coming]


class OffloadedExperts(nn.Module):
    """A layer's experts by way of the store; the same result as the reference backend."""

    def __init__(
        self, activation: str, layer: int, store: ExpertStore, ahead: tuple[int, Router] | None
    ):
        super().__init__()
        self.activation, self.layer, self.store = ACTIVATIONS[activation], layer, store
        self.gated = activation == "swiglu"
        self.ahead = [ahead] if ahead else []  # the next layer's router, and not a part of this one

    def forward(self, x: Tensor, routing: Routing) -> Tensor:  # (N, D) -> (N, D)
        ids, y = carried_out(routing)[0].view_as(routing.ids), torch.zeros_like(x)
        for expert, (first, down) in self.each(ids.unique().tolist(), x):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            out = F.linear(self.activation(F.linear(x[token], first)), down)
            y = y.index_add(0, token, out * routing.weights[token, slot].unsqueeze(-1))
        return y

    def each(
        self, experts: Iterable[int], x: Tensor
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Experts that tokens (N, D) call, and their weights, which stay until the next is asked.

        What the next layer may call is asked for meanwhile.
        """
        called = [(self.layer, expert) for expert in experts]
        if len(called) <= len(self.store.first):
            self.store.hold(called)  # so that none makes room for another
            self._look_ahead(x)
        for key in called:
            yield key[1], self.store.get(key)
            self.store.let_go(key)

    def _look_ahead(self, x: Tensor) -> None:
        """Read what the next router would choose if it saw this layer's input.

        Layers change the residual stream little (Eliseev & Mazur 2023, sec. 3.2).
        """
        for layer, router in self.ahead:
            guesses = router.select(scores_of(router.logits(x.unsqueeze(0)), router.moe.score))
            self.store.guess([(layer, expert) for expert in guesses.unique().tolist()])


def load_offloaded(
    run: Run, budget: str, *, policy: Policy = "lru", prefetch: bool = False
) -> tuple[Recipe, GPT, int, ExpertStore]:
    """A run's recipe, decoder in eval mode on the CPU, step, and store of `budget` of its experts.

    `budget` is a share, such as 25%, or a size, such as 64MB. Raises UserError where it is
    neither, or has no room for one token's experts.
    """
    recipe, (file, rest, step) = run.recipe(), split_weights(run)
    store = ExpertStore(file, slots_of(budget, file, recipe), policy)
    with torch.device("meta"):
        model = GPT(recipe.model)
    _leave_on_disk(model, store, prefetch)
    model.to_empty(device="cpu")
    if recipe.model.tie_embeddings:
        model.head.weight = model.embedding.weight
        rest["head.weight"] = rest["embedding.weight"]
    model.load_state_dict(rest)
    config = recipe.model
    model.cos, model.sin = rope_tables(config.context, config.rope_size, config.rope_theta)
    return recipe, model.eval(), step, store


def _leave_on_disk(model: GPT, store: ExpertStore, prefetch: bool) -> None:
    """Put the store in the place of every layer's experts."""
    following: tuple[int, Router] | None = None
    for layer in reversed(range(len(model.blocks))):
        ffn = model.blocks[layer].ffn
        if isinstance(ffn, MoE):
            ffn.experts = OffloadedExperts(model.config.activation, layer, store, following)
            router = ffn.router
            # A router of several positions would need what the layer before it saw of them.
            following = None
            if prefetch and isinstance(router, Router) and router.moe.router_window == 1:
                following = (layer, router)


def slots_of(budget: str, file: ExpertFile, recipe: Recipe) -> int:
    """How many experts a budget holds, at most all of them."""
    everything, one = len(file.keys), file.expert_bytes
    slots = int(_bytes_of(budget, everything * one) // one)
    assert recipe.model.moe is not None
    top_k = recipe.model.moe.top_k
    if slots < top_k:
        least = -(-1000 * top_k // everything) / 10  # rounded up
        raise UserError(
            f"--expert-budget {budget}: holds {slots} of {everything} experts, {one:,} bytes each, "
            f"and a token visits {top_k}; give {least:g}% or more"
        )
    return min(slots, everything)


def _bytes_of(budget: str, everything: int) -> float:
    text = budget.strip().upper()
    for unit, size in {"%": everything, **UNITS}.items():
        if text.endswith(unit):
            try:
                amount = float(text.removesuffix(unit))
            except ValueError:
                break
            if 0 < amount < float("inf"):
                # Divided last: a hundredth of 19 experts, a hundred times, is less than 19.
                return amount * size / (100 if unit == "%" else 1)
    raise UserError(f"--expert-budget {budget}: give a share or a size, such as 25% or 64MB")
