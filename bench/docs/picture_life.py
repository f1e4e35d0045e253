"""The life of a token: the stages of a prompt and of a decoded token, and who replaces them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvpress.bench.docs.stages import replaced_by
from kvpress.bench.docs.svg import Svg

_WIDTH, _HEIGHT = 976, 400
_LEFT, _BOX, _TALL, _STEP = 16, 82, 34, 96  # pixels: of a box, and from one to the next
_TOP, _LOWER = 66, 300  # where the boxes of a prompt and of a new token begin
_LINE = 15  # pixels of a line of text
_PROMPT = (
    *("sparsify", "attention", "observe", "accumulate", "share", "score", "select", "absorb"),
    "store",
)
_TOKEN = ("append", "retrieve", "attention", "observe", "accumulate", "score", "evict", "absorb")
_OLD = ("prune", "pack")


def draw() -> str:
    """The picture."""
    picture = Svg(
        _WIDTH,
        _HEIGHT,
        "The life of a token",
        f"Of a prompt: {', '.join(_PROMPT)}. Of a new token: {', '.join(_TOKEN)}, one slot a step."
        f" Of old slots: {' and '.join(_OLD)}. Stages that a policy replaces are blue; below each"
        " stand the policies that do.",
    )
    replaced = replaced_by()
    picture.text(_LEFT, 30, "The life of a token", size=15)
    picture.text(_LEFT, _TOP - 10, "a prompt, layer by layer", "soft", 12)
    _lane(picture, _PROMPT, _TOP, replaced)
    _below(picture, replaced)
    picture.text(_LEFT, _LOWER - 10, "a new token, mostly one call per layer", "soft", 12)
    _lane(picture, (*_TOKEN, *_OLD), _LOWER, replaced)
    _to_old(picture, replaced)
    return str(picture)


def _lane(picture: Svg, names: Sequence[str], y: float, replaced: Mapping[str, object]) -> None:
    """Boxes from left to right, an arrow from each to the next."""
    for i, name in enumerate(names):
        x = _LEFT + i * _STEP
        stage = name in replaced
        picture.rect(x, y, _BOX, _TALL, "c0" if stage else "card", round_=6)
        picture.text(x + _BOX / 2, y + 22, name, "page" if stage else "ink", 13, "middle")
        if i:
            picture.arrow(x - _STEP + _BOX + 2, y + _TALL / 2, x - 2, y + _TALL / 2)


def _below(picture: Svg, replaced: Mapping[str, Sequence[str]]) -> None:
    """The policies that replace a stage, under its box in the lane of a prompt."""
    for i, name in enumerate(_PROMPT):
        for j, policy in enumerate(replaced.get(name, ())):
            y = _TOP + _TALL + 18 + j * _LINE
            picture.text(_LEFT + i * _STEP + _BOX / 2, y, policy, "soft", 12, "middle")


def _to_old(picture: Svg, replaced: Mapping[str, Sequence[str]]) -> None:
    """What a prompt stored becomes old too; who replaces what happens to new tokens alone."""
    first, last = (_LEFT + i * _STEP + _BOX / 2 for i in (len(_TOKEN), len(_PROMPT) - 1))
    turn = _LOWER - 46
    picture.line([(last, _TOP + _TALL + 2), (last, turn), (first, turn)], "soft", 1.5)
    picture.arrow(first, turn, first, _LOWER - 2)
    picture.text(first + 12, turn + 20, "slots that are old", "soft", 12)
    for i, name in enumerate((*_TOKEN, *_OLD)):
        for j, policy in enumerate(
            replaced[name] if name not in _PROMPT and name in replaced else ()
        ):
            y = _LOWER + _TALL + 18 + j * _LINE
            picture.text(_LEFT + i * _STEP + _BOX / 2, y, policy, "soft", 12, "middle")
