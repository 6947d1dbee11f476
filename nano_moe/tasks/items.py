"""What the tasks ask, drawn from the validation split with a seed.

passages  stretches of text, whose bits per byte are measured
pairs     a sentence of the text and one with a small fault; the real one should be likelier
cloze     text whose next word stood in it before; that word should follow
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nano_moe.errors import UserError
from nano_moe.text.store import Corpus

PASSAGE = 1000  # characters at most
SENTENCE = re.compile(r"(?<=[.!?] )[^\W\d_][^.!?]{38,198}[.!?](?= |$)")  # after another one
WORD = re.compile(r"[^\W\d_]+")
NEXT = re.compile(r"(?<=\S )[^\W\d_]{4,}")  # one space after what stands before
# English words that mostly cannot stand for one another.
OTHERS = {
    **{"is": "are", "was": "were", "has": "have", "does": "do", "this": "these"},
    **{"are": "is", "were": "was", "have": "has", "do": "does", "these": "this"},
    **{"a": "an", "an": "a", "he": "him", "him": "he", "they": "them", "them": "they"},
}
TRIES = 200  # texts looked at for one item


@dataclass(frozen=True)
class Tasks:
    """The items of each task, as mappings of plain text; each says its domain."""

    passages: list[dict[str, Any]]  # text
    pairs: list[dict[str, Any]]  # good, bad, kind
    cloze: list[dict[str, Any]]  # context, target


def make_tasks(corpus: Corpus, *, context: int, seed: int, n: int) -> Tasks:
    """`n` passages, `n` pairs of each kind and `n` cloze items, or fewer where text lacks them.

    Domains take turns; sentences fit a context of so many tokens. Raises UserError where the split
    holds no text of 40 characters.
    """
    rng = random.Random(seed)
    texts = list(_passages(corpus, rng))
    if not texts:
        raise UserError(f"{corpus.path}: the validation split holds no text to make tasks of")

    def fits(text: str) -> bool:
        return len(corpus.tokenizer.encode(text)) <= context

    return Tasks(
        passages=[{"text": text, "domain": domain} for domain, text in texts[:n]],
        pairs=[pair for kind in FAULTS for pair in _pairs(texts, kind, fits, rng, n)],
        cloze=list(_cloze(texts, rng, n)),
    )


def _passages(corpus: Corpus, rng: random.Random) -> Iterator[tuple[str, str]]:
    """All passages of the split as (domain, text), each domain's shuffled, domains in turns."""
    by_domain: dict[str, list[str]] = {}
    for domain, text in documents(corpus):
        by_domain.setdefault(domain, []).extend(_cut(text))
    for texts in by_domain.values():
        rng.shuffle(texts)
    for place in range(max(map(len, by_domain.values()), default=0)):
        for domain, texts in by_domain.items():
            if place < len(texts):
                yield domain, texts[place]


def documents(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """The validation documents as (domain, text)."""
    split = corpus.val
    ends = [*split.starts[1:], len(split)]
    for start, end, domain in zip(split.starts, ends, split.domain_ids, strict=True):
        ids = split.tokens[start : end - 1].tolist()  # without the end token
        yield corpus.domains[domain], corpus.tokenizer.decode(ids)


def _cut(text: str) -> Iterator[str]:
    """Consecutive passages that begin and end with words."""
    start = 0
    while start < len(text):
        end = start + PASSAGE
        if end < len(text):
            end = max(text.rfind(" ", start, end), text.rfind("\n", start, end), start + 1)
        passage = text[start:end].strip()
        if len(passage) >= 40:
            yield passage
        start = end


def _swapped_words(sentence: str, rng: random.Random) -> str | None:
    """Two neighbouring words change places."""
    words = sentence[:-1].split(" ")
    places = [i for i in range(1, len(words) - 1) if words[i].lower() != words[i + 1].lower()]
    if not places:
        return None
    i = rng.choice(places)
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words) + sentence[-1]


def _swapped_letters(sentence: str, rng: random.Random) -> str | None:
    """Two letters inside a word change places."""
    places = [
        i
        for word in WORD.finditer(sentence)
        for i in range(word.start() + 1, word.end() - 2)
        if sentence[i] != sentence[i + 1]
    ]
    if not places:
        return None
    i = rng.choice(places)
    return sentence[:i] + sentence[i + 1] + sentence[i] + sentence[i + 2 :]


def _wrong_form(sentence: str, rng: random.Random) -> str | None:
    """A small English word in its other form: is and are, a and an, he and him."""
    words = [word for word in WORD.finditer(sentence) if word[0] in OTHERS]
    if not words:
        return None
    word = rng.choice(words)
    return sentence[: word.start()] + OTHERS[word[0]] + sentence[word.end() :]


FAULTS = {"word order": _swapped_words, "spelling": _swapped_letters, "word form": _wrong_form}
ENGLISH_ONLY = {"word form"}


def _pairs(
    texts: list[tuple[str, str]],
    kind: str,
    fits: Callable[[str], bool],
    rng: random.Random,
    n: int,
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for domain, text in texts[: n * TRIES]:
        if len(seen) == n:
            return
        if kind in ENGLISH_ONLY and domain.endswith(("_fr", "_es", "_python")):
            continue
        found = SENTENCE.findall(" ".join(text.split()))  # lines are joined
        sentences = [sentence for sentence in found if sentence not in seen]
        good = rng.choice(sentences) if sentences else ""
        bad = FAULTS[kind](good, rng) if good else None
        if bad and bad != good and fits(good) and fits(bad):
            seen.add(good)
            yield {"good": good, "bad": bad, "kind": kind, "domain": domain}


def _cloze(texts: list[tuple[str, str]], rng: random.Random, n: int) -> Iterator[dict[str, Any]]:
    found = 0
    for domain, text in texts[: n * TRIES]:
        if found == n:
            return
        late = [word for word in NEXT.finditer(text) if word.start() > 100]
        known = [word for word in late if word[0] in WORD.findall(text[: word.start()])]
        if known:
            word = rng.choice(known)
            context = text[: word.start() - 1]
            yield {"context": context, "target": word[0], "domain": domain}
            found += 1
