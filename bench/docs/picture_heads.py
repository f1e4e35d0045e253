"""The budget of every head: a row for each KV head, a bar for each layer."""

from __future__ import annotations

import statistics

from kvpress.bench.docs.record_heads import Budgets, read
from kvpress.bench.docs.svg import Svg
from kvpress.bench.docs.tables import percent

_WIDTH, _LEFT, _RIGHT, _TOP = 880, 78, 862, 56  # pixels
_HIGH, _GAP = 64, 22  # of a bar that keeps everything; between heads


def draw() -> str:
    """The picture of what is recorded."""
    return str(picture(read()))


def picture(found: Budgets) -> Svg:
    """Bars are shares of the tokens seen; the line is the mean."""
    layers, heads = len(found.slots), max(map(len, found.slots))
    height = _TOP + heads * (_HIGH + _GAP) + 34
    mean = statistics.fmean(n for rows in found.slots for n in rows) / found.tokens_seen
    held = percent(found.bytes_held / found.bytes_full)
    made = Svg(
        _WIDTH,
        height,
        "The budget of every head",
        f"{found.policy} after {found.tokens_seen} tokens of SmolLM2-135M: the share of them that"
        f" each of {heads} KV heads keeps in {layers} layers. On average {percent(mean)} of the"
        f" tokens stay; the cache holds {held} of the bytes of the full one.",
    )
    made.text(_LEFT, 24, f"{found.policy}: tokens that each KV head keeps", size=15)
    made.text(_RIGHT, 24, f"{held} of the bytes", "soft", anchor="end")
    step = (_RIGHT - _LEFT) / layers
    for head in range(heads):
        bottom = _TOP + head * (_HIGH + _GAP) + _HIGH
        made.text(_LEFT - 10, bottom - _HIGH / 2 + 4, f"head {head}", "soft", 12, "end")
        made.line([(_LEFT, bottom), (_RIGHT, bottom)], "ghost")
        for layer, rows in enumerate(found.slots):
            tall = _HIGH * rows[head] / found.tokens_seen if head < len(rows) else 0
            x = _LEFT + layer * step
            made.rect(x, bottom - _HIGH, step - 3, _HIGH, "card")
            made.rect(x, bottom - tall, step - 3, tall, "c0")
        level = bottom - mean * _HIGH
        made.line([(_LEFT, level), (_RIGHT - 3, level)], "soft", 1, "3 3")
    for layer in range(0, layers, 5):
        x = _LEFT + (layer + 0.5) * step - 1.5
        made.text(x, height - 34, str(layer), "soft", 12, "middle")
    made.text((_LEFT + _RIGHT) / 2, height - 14, "layer", "soft", 12, "middle")
    return made
