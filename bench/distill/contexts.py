"""Contexts that a target reads: a passage, facts in it, and later questions and repetitions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvpress.bench.common.prompt import as_chat
from kvpress.bench.common.text import TextError
from kvpress.bench.distill.facts import fact

TRAINED = 0.8  # of a text: the first part; the rest is held out
_MIXTURES = ((10, 6), (0, 8), (16, 3), (6, 6))  # facts and repeated spans, in turn
_SHORTEST, _LONGEST = 40, 90  # tokens of a repeated span
_ASKED = 0.4  # of a passage, behind which things are asked for or repeated


class Context(NamedTuple):
    """The ids of a context, and which of them ask for something, or repeat it."""

    ids: list[int]
    hot: list[int]


class _Piece(NamedTuple):
    """Something that is put into a passage. hot: whether it asks for what stands before it."""

    share: float  # of the passage that stands before it
    ids: Sequence[int]
    hot: bool


class Maker:
    """Makes contexts of the ids of a text, each from a seed."""

    def __init__(self, tokenizer: Any, ids: Sequence[int], tokens: int) -> None:
        if len(ids) < tokens:
            raise TextError(
                f"A part of the text has {len(ids):,} tokens, and a context takes {tokens:,}. Give"
                " a longer text, or fewer --tokens."
            )
        self._tokenizer, self._ids, self._tokens = tokenizer, ids, tokens
        mark = "MARK"
        self._before, _, self._after = as_chat(tokenizer, mark).partition(mark)

    @property
    def room(self) -> int:
        """How many tokens later than at the first one a context may start."""
        return len(self._ids) - self._tokens

    def plain(self, start: int) -> Context:
        """Nothing but the text."""
        return Context(list(self._ids[start : start + self._tokens]), [])

    def make(self, seed: str, number: int) -> Context:
        """Facts and repetitions in a passage; every second one as a chat whose answer has begun."""
        generator = random.Random(f"{seed}-{number}")
        facts, repeats = _MIXTURES[number % len(_MIXTURES)]
        start = generator.randrange(len(self._ids) - self._tokens + 1)
        passage = self._ids[start : start + self._tokens]
        pieces = [*self._facts(generator, facts), *self._repeats(generator, passage, repeats)]
        before, last = ([], _Piece(1.0, (), True)) if number % 2 else self._chat(pieces, generator)
        room = self._tokens - len(before) - len(last.ids) - sum(len(p.ids) for p in pieces)
        made, hot, at = list(before), list[int](), 0
        for piece in (*sorted(pieces, key=lambda piece: piece.share), last):
            end = max(0, int(piece.share * room))
            made += passage[at:end]
            at = end
            if piece.hot:
                hot += range(len(made), len(made) + len(piece.ids))
            made += piece.ids
        return Context(made[: self._tokens], [place for place in hot if place < self._tokens])

    def _facts(self, generator: random.Random, count: int) -> list[_Piece]:
        """Statements in the first part, and later each again: after a question, or by itself."""
        pieces = []
        for _ in range(count):
            told, share = fact(generator), 0.6 * generator.random()
            asked = f"\n{told.answer}\n"
            if generator.random() < 0.5:
                asked = f"\n\nQuestion: {told.question}\nAnswer: {told.answer}\n"
            later = max(share + 0.08, _ASKED + (1 - _ASKED) * generator.random())
            pieces += [
                _Piece(share, self._words(told.statement), False),
                _Piece(later, self._words(asked), True),
            ]
        return pieces

    def _repeats(
        self, generator: random.Random, passage: Sequence[int], count: int
    ) -> list[_Piece]:
        """Spans of the passage that come again."""
        pieces = []
        for _ in range(count):
            share = _ASKED + (1 - _ASKED) * generator.random()
            length = generator.randrange(_SHORTEST, _LONGEST)
            # What is put in takes room: spans come from well before where they are repeated.
            start = int(0.7 * generator.random() * share * len(passage))
            pieces.append(_Piece(share, passage[start : start + length], True))
        return pieces

    def _chat(self, pieces: list[_Piece], generator: random.Random) -> tuple[list[int], _Piece]:
        """What a chat begins with, and its end: a question about a new fact, and its answer."""
        told = fact(generator)
        pieces.append(_Piece(0.6 * generator.random(), self._words(told.statement), False))
        end = f"\n\n{told.question}{self._after}{told.answer}"
        return self._words(self._before), _Piece(1.0, self._words(end), True)

    def _words(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def split(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The ids of a text, those to train on and those held out, which share none."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = int(TRAINED * len(ids))
    return ids[:cut], ids[cut:]


def sampled(context: Context, count: int, first: int, seed: str) -> list[int]:
    """Places of queries, in order: half of them ask for something, where so many do."""
    generator = random.Random(seed)
    hot = [place for place in context.hot if place >= first]
    chosen = set(generator.sample(hot, min(len(hot), count // 2)))
    rest = [place for place in range(first, len(context.ids)) if place not in chosen]
    return sorted(chosen | set(generator.sample(rest, count - len(chosen))))
