"""What each head kept of one prompt: a row for every KV head, a column for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvpress.bench.docs.record import Map, read
from kvpress.bench.docs.svg import Svg
from kvpress.bench.docs.tables import percent

_LEFT, _TOP, _ROW, _GAP = 66, 58, 4, 3  # pixels: of the first row, of each row, between layers
_WIDTH = 880


class Area(NamedTuple):
    """Where rows of tokens are drawn: the left end, and the pixels of a token."""

    left: float
    scale: float


def draw() -> str:
    """The picture."""
    found = read()
    heads = sum(len(rows) for rows in found.positions)
    height = _TOP + heads * _ROW + len(found.positions) * _GAP + 42
    share = percent(found.bytes_held / found.bytes_full)
    picture = Svg(
        _WIDTH,
        height,
        "What each head kept of one prompt",
        f"{found.policy} after {found.tokens_seen} tokens of SmolLM2-135M: one row for each of"
        f" {heads} KV heads in {len(found.positions)} layers, one column for each token; coloured"
        f" where the token is still held. The cache holds {share} of the bytes of the full one.",
    )
    picture.text(_LEFT, 24, f"{found.policy}: tokens that each KV head still holds", size=15)
    picture.text(_WIDTH - 18, 24, f"{share} of the bytes", "soft", anchor="end")
    area = Area(_LEFT, (_WIDTH - 18 - _LEFT) / found.tokens_seen)
    _parts(picture, found, area)
    _rows(picture, found, area)
    picture.text(_LEFT, height - 14, "first token", "soft", 12)
    picture.text(_WIDTH - 18, height - 14, "last token", "soft", 12, "end")
    return str(picture)


def _rows(picture: Svg, found: Map, area: Area) -> None:
    y = float(_TOP)
    for layer, rows in enumerate(found.positions):
        if layer % 5 == 0:
            picture.text(_LEFT - 8, y + 10, f"layer {layer}", "soft", 12, "end")
        ink = "c0" if layer % 2 == 0 else "c3"
        for row in rows:
            row_of(picture, area, y, row, _ROW - 0.5, ink)
            y += _ROW
        y += _GAP


def row_of(
    picture: Svg, area: Area, y: float, kept: Sequence[int], height: float, ink: str
) -> None:
    """The tokens that one row holds."""
    picture.runs(
        area.left, y, ((s * area.scale, n * area.scale) for s, n in _spans(kept)), height, ink
    )


def _parts(picture: Svg, found: Map, area: Area) -> None:
    """Where the prompt ends and the answer begins."""
    x = area.left + found.prompt_tokens * area.scale
    bottom = _TOP + sum(len(rows) * _ROW + _GAP for rows in found.positions)
    picture.line([(x, _TOP - 14), (x, bottom)], "soft", 1, "3 3")
    picture.text(x - 6, _TOP - 6, "the prompt", "soft", 12, "end")
    picture.text(x + 4, _TOP - 6, "answer", "soft", 12)


def _spans(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours: the first one, and how many they are."""
    start = previous = positions[0]
    for position in (*positions[1:], None):
        if position is None or position != previous + 1:
            yield start, previous + 1 - start
            start = position or 0
        previous = position or 0
