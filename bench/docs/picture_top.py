"""The first picture of the README: one layer before and after, and the bytes of the whole cache."""

from __future__ import annotations

from kvpress.bench.docs.picture_kept import Area, row_of
from kvpress.bench.docs.record import Map, read
from kvpress.bench.docs.svg import Svg
from kvpress.bench.docs.tables import percent

_LAYER = 15
_WIDTH, _HEIGHT, _LEFT, _ROW = 880, 264, 106, 20
_MIB = 2**20


def draw() -> str:
    """The picture."""
    found = read()
    share = percent(found.bytes_held / found.bytes_full)
    picture = Svg(
        _WIDTH,
        _HEIGHT,
        "A full cache and a compressed one",
        f"Above, the keys and values of {found.tokens_seen} tokens in the three KV heads of one"
        f" layer. Below, those that {found.policy} still holds. Bars: the whole cache holds"
        f" {found.bytes_full / _MIB:.1f} MiB before and {found.bytes_held / _MIB:.1f} MiB after,"
        f" {share}.",
    )
    area = Area(_LEFT, (_WIDTH - 18 - _LEFT) / found.tokens_seen)
    everything = list(range(found.tokens_seen))
    rows = found.positions[_LAYER]
    title = f"Layer {_LAYER} after {found.tokens_seen} tokens: what each KV head holds"
    picture.text(_LEFT, 26, title, size=15)
    for top, what, ink in ((44, "full cache", "soft"), (118, "keyformer", "c0")):
        picture.text(_LEFT - 12, top + 1.5 * _ROW - 2, what, "ink", 13, "end")
        for head, kept in enumerate(rows):
            shown = everything if ink == "soft" else kept
            picture.rect(_LEFT, top + head * _ROW, _WIDTH - 18 - _LEFT, _ROW - 4, "card")
            row_of(picture, area, top + head * _ROW, shown, _ROW - 4, ink)
    _bytes(picture, found, share)
    return str(picture)


def _bytes(picture: Svg, found: Map, share: str) -> None:
    """A bar for all layers of each cache."""
    width = 560
    picture.text(_LEFT - 12, 218, "bytes held", "ink", 13, "end")
    bars = (("soft", found.bytes_full, "full cache"), ("c0", found.bytes_held, found.policy))
    for i, (ink, held, name) in enumerate(bars):
        y, length = 204 + 24 * i, width * held / found.bytes_full
        picture.rect(_LEFT, y, length, 16, ink)
        text = f"{held / _MIB:.1f} MiB, {name}" + (f": {share}" if i else "")
        picture.text(_LEFT + length + 8, y + 13, text, "ink", 13)
