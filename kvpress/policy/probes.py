"""A second look at a text: tokens that are read after it, attend to it, and are forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Text(NamedTuple):
    """What a policy is shown of one sequence when it may ask for a second look.

    ids: all its real tokens. first: the first one since the last look. texts: the tokens of the
    policy's `texts`. room: positions that the model has behind the text.
    """

    ids: Sequence[int]
    first: int
    texts: Sequence[Sequence[int]]
    room: int


class Probe(NamedTuple):
    """Tokens that are read behind a text; nothing of them stays.

    first, last: the tokens of the text whose slots are observed, `last` not among them. The softmax
    that is observed runs over the sinks (the first 4 tokens, and protected ones before `first`),
    over these, and over the probe itself up to each query: it does not depend on the rest of the
    text. What the probe computes does.
    """

    ids: Sequence[int]
    first: int
    last: int
