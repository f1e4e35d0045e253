"""Quality against bytes: every policy at several budgets, beside transformers' own caches."""

from __future__ import annotations

from kvpress.bench.docs.quality import BLIND, curves, points
from kvpress.bench.docs.svg import Svg

_WIDTH, _HEIGHT = 880, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 690, 46, 420
_LOW, _HIGH = 0.36, 0.95  # right tokens
_MOST = 1.05  # bytes, of those of the full cache
_NAMES = {  # those points that are labelled, and where the text stands: right, below, above or left
    "quant:key_bits=8,value_bits=8": ("quant 8 bits", 6, 17, "start"),
    "quant": ("quant 4 bits", 10, -14, "end"),
    "quant:key_bits=2,value_bits=2": ("quant 2 bits", 6, 17, "start"),
    "think:keep=0.8": ("think 0.8", 0, -10, "middle"),
    "think": ("think 0.6", 0, 18, "middle"),
    "keyformer:budget=0.5+think+quant": ("keyformer+think+quant", 8, 4, "start"),
    "transformers-fp8": ("fp8", 8, 15, "start"),
    "transformers-int4": ("int4", -8, 8, "end"),
    "transformers-int2": ("int2", 8, 4, "start"),
}


def draw() -> str:
    """The picture."""
    picture = Svg(
        _WIDTH,
        _HEIGHT,
        "Quality against bytes held",
        "Right tokens of copies from five contexts of 1,024 tokens, SmolLM2-135M, over the bytes"
        " that the cache holds as a share of the full one: a line for each policy that takes a"
        " budget, marks for those that store old tokens in fewer bits or channels, and for"
        " transformers' quantised caches. The figures stand in docs/quality.md.",
    )
    picture.text(_LEFT, 24, "Copies from the context, % of tokens right", size=15)
    _axes(picture)
    _levels(picture)
    for number, (name, curve) in enumerate(curves().items()):
        ink = f"c{number % 8}"
        picture.line([_place(*point) for point in curve], ink, 2)
        for point in curve:
            picture.mark(*_place(*point), number, ink)
        y = _TOP + 26 + 22 * number
        picture.line([(_RIGHT + 22, y), (_RIGHT + 50, y)], ink, 2)
        picture.mark(_RIGHT + 36, y, number, ink)
        picture.text(_RIGHT + 60, y + 4, name)
    _marks(picture)
    return str(picture)


def _axes(picture: Svg) -> None:
    for score in (40, 50, 60, 70, 80, 90):
        _, y = _place(0, score / 100)
        picture.line([(_LEFT, y), (_RIGHT, y)], "ghost")
        picture.text(_LEFT - 8, y + 4, str(score), "soft", 12, "end")
    for share in (0, 20, 40, 60, 80, 100):
        x, _ = _place(share / 100, 0)
        picture.text(x, _BOTTOM + 18, f"{share} %", "soft", 12, "middle")
    middle = (_LEFT + _RIGHT) / 2
    picture.text(
        middle, _BOTTOM + 38, "bytes held, of those of the full cache", "soft", 12, "middle"
    )
    picture.text(_RIGHT + 22, _TOP + 8, "evict or merge tokens", "soft", 12)
    picture.text(_RIGHT + 22, _TOP + 222, "store old tokens smaller", "soft", 12)


def _levels(picture: Svg) -> None:
    """The full cache, and the questions alone."""
    found = points()
    for name, text, dash in (("full", "full cache", "6 4"), (BLIND, "no context", "2 4")):
        _, y = _place(0, found[name][1])
        picture.line([(_LEFT, y), (_RIGHT, y)], "soft", 1.5, dash)
        picture.text(_LEFT + 0.55 * (_RIGHT - _LEFT), y - 6, text, "soft", 12)


def _marks(picture: Svg) -> None:
    found = points()
    for name, (text, right, down, anchor) in _NAMES.items():
        own = not name.startswith("transformers")
        x, y = _place(*found[name])
        picture.mark(x, y, 2 if own else 1, "ink" if own else "soft", 5)
        picture.text(x + right, y + down, text, "ink" if own else "soft", 12, anchor)
    for row, (shape, ink, text) in enumerate(((2, "ink", "here"), (1, "soft", "transformers"))):
        y = _TOP + 244 + 22 * row
        picture.mark(_RIGHT + 36, y, shape, ink, 5)
        picture.text(_RIGHT + 60, y + 4, text)


def _place(share: float, score: float) -> tuple[float, float]:
    """Pixels of a share of the bytes and a share of right tokens."""
    x = _LEFT + share / _MOST * (_RIGHT - _LEFT)
    return x, _BOTTOM - (score - _LOW) / (_HIGH - _LOW) * (_BOTTOM - _TOP)
