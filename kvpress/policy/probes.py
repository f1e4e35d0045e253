"""A second look at a text: tokens that are read after it, attend to it, and are forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn


def _unknown() -> NoReturn:
    raise LookupError('No words are known: say needs = frozenset({"words"}) in the policy.')


class Text(NamedTuple):
    """What a policy is shown of one sequence when it may ask for a second look.

    ids: all its real tokens. first: the first one since the last look. texts: the tokens of the
    policy's `texts`. room: positions that the model has behind the text. words: every token as it
    is written, for policies that need "words".
    """

    ids: Sequence[int]
    first: int
    texts: Sequence[Sequence[int]]
    room: int
    words: Callable[[], Sequence[str]] = _unknown


class Probe(NamedTuple):
    """Tokens that are read behind a text; nothing of them stays.

    first, last: the tokens of the text whose slots are observed, `last` not among them. The softmax
    that is observed runs over the sinks (the first 4 tokens, and protected ones before `first`),
    over these, and over the probe itself up to each query: it does not depend on the rest of the
    text. alone: what the probe computes does not either, since it attends to nothing else; its cost
    then does not grow with the text. factors: by which what is observed is multiplied, of each
    token that it is of; None: by 1.
    """

    ids: Sequence[int]
    first: int
    last: int
    alone: bool = False
    factors: Sequence[float] | None = None


def repetitions(
    text: Text, size: int, cue: int, alone: bool, factors: Sequence[float] | None = None
) -> list[Probe]:
    """Probes that repeat what is new of a text, a chunk of `size` tokens at a time.

    The first begins with the first of `texts`, others with the second and the last `cue` tokens
    before them; chunks are shorter where the model's positions end. A tail of less than a quarter
    of a chunk joins the one before, where there is room for both: attention among few tokens is
    larger. alone: see `Probe`. factors: of every token of the text.
    """
    (opening, further), end = text.texts, len(text.ids)
    room = text.room - max(len(opening), len(further) + cue)
    starts = list(range(text.first, end, max(1, min(size, room))))
    if len(starts) > 1 and end - starts[-1] < size // 4 and 4 * room >= 5 * size:
        starts.pop()
    made = []
    for start, stop in pairwise([*starts, end]):  # none where all of it is protected
        before = (*further, *text.ids[start - cue : start]) if start > text.first else opening
        part = None if factors is None else factors[start:stop]
        made.append(Probe((*before, *text.ids[start:stop]), start, stop, alone, part))
    return made
