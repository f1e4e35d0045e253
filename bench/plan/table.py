"""What a plan says in a table: what fits where, and how long texts may be."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.bench.common.report import Sheet

from kvpress.formulas.memory_model import MemoryModel
from kvpress.formulas.sizes import readable
from kvpress.pipe.plan.fit import LEAST, Asked, fit
from kvpress.pipe.plan.plan import Fit
from kvpress.policy.ladder import Rung

HEAD = ("kind", "policy", "where", "fits", "keys, values", "reading", "in all", "chunk", "longest")
LEGEND = (
    "keys, values: what the cache holds in the end, as the ledger counts it. reading: what a pass"
    " takes for a while, at most, with what libraries load. in all: of the device, with what is"
    " there before. chunk: tokens of each prompt that are read at once. longest: tokens of a"
    " sequence, with as many of them decoded, that still fit."
)
WINDOW = 2048  # tokens that SpeContext keeps of an offloaded layer
_MOST = 1 << 22  # tokens: a longer text is not asked for


def longest(asked: Asked, rung: Rung) -> int:
    """The longest text that fits; 0: none does. Beyond _MOST nothing is looked for."""

    least = rung._replace(spec=rung.at(LEAST))

    def fits(tokens: int) -> bool:
        return fit(asked._replace(texts=asked.texts._replace(length=tokens)), least).fits

    low = asked.texts.new + 1
    if not fits(low):
        return 0
    high = low
    while high < _MOST and fits(2 * high):
        high *= 2
    low, high = high, min(2 * high, _MOST)
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sheet(asked: Asked, tried: Sequence[tuple[Rung, Fit]], title: str) -> Sheet:
    """All policies, the harmless ones first; the first that fits is what `attach` takes."""
    lines = tuple(_line(asked, rung, found) for rung, found in tried)
    notes = tuple(str(found) for _, found in tried if found.refused)
    return Sheet(title, HEAD, lines, notes, labels=3)


def _line(asked: Asked, rung: Rung, found: Fit) -> tuple[str, ...]:
    where = "device, then tiers" if found.tiered else "device"
    if found.refused:
        return (found.kind, found.policy, where, "no", *["–"] * 5)
    tokens = longest(asked, rung)
    return (
        found.kind,
        found.policy,
        where,
        "yes" if found.fits else "no",
        readable(found.bytes.held),
        readable(found.passing),
        readable(found.needed),
        "whole" if found.chunk >= asked.texts.prompt else f"{found.chunk:,}",
        f"over {_MOST:,}" if tokens >= _MOST * 255 // 256 else f"{tokens:,}",
    )


def thresholds(asked: Asked, weights: int) -> str:
    """From which lengths on layers must leave the device, by the memory model of SpeContext."""
    shape, kinds = asked.shape, asked.shape.tiered
    kind = max(kinds, key=lambda own: own.heads * own.width)
    copies = max(1, (kind.queries or kind.heads) // kind.heads)
    model = MemoryModel(
        weights, asked.texts.batch, len(kinds), kind.heads, kind.width, WINDOW, copies
    )
    found = model.thresholds(asked.memory.given)
    shown = (0, len(kinds) // 4, len(kinds) // 2, len(kinds))
    said = ", ".join(f"{found[away]:,} with {away}" for away in shown)
    return (
        f"SpeContext's memory model, for orientation (16 bits, {WINDOW:,} tokens kept of an"
        f" offloaded layer; {shape.name}, batch {asked.texts.batch}): the longest text is {said}"
        " layers offloaded."
    )
