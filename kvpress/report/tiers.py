"""What a report says of tiers: where bytes are, what moved, and what waiting for it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvpress.report.tables import size


@dataclass(frozen=True)
class Way:
    """What went one way: bytes, seconds that moving them took, and how often."""

    bytes: int
    seconds: float
    count: int


@dataclass(frozen=True, kw_only=True)
class TierFigures:
    """The tiers of a cache; all but `held` and `pages` is of its engine, whose caches share them.

    held: bytes of this cache in each tier: device, host, disk; on the device its recent slots,
    tables and positions too. pages: its pages alone. caps: the most of each tier. used: bytes that
    are taken there, by pages on the device and by records, with headers, below it. aside: bytes for
    what is on its way. ways: by direction. hits: pages that attention asked for, by where they
    were. stalls: seconds that it waited for them. verified: bytes read whose checksum was right.
    failures: reads and writes that failed, with timeouts and integrity_failures among them. direct:
    whether the disk is read past the page cache; None: there is no disk tier. reading: seconds that
    reading the pages of this cache in lower tiers once takes, at the rates so far; None: not known.
    prompt: seconds that its prompts took; 0: not known.
    """

    held: Mapping[str, int]
    pages: Mapping[str, int]
    caps: Mapping[str, int]
    used: Mapping[str, int]
    aside: Mapping[str, int]
    ways: Mapping[str, Way]
    hits: Mapping[str, int]
    stalls: float
    verified: int
    rereads: int
    failures: int
    timeouts: int
    integrity_failures: int
    direct: bool | None
    reading: float | None
    prompt: float


def remark(tiers: TierFigures) -> str:
    """One sentence of all of it."""
    places = (
        f"{name} {size(held)} of {size(tiers.caps[name])}"
        if name != "device"
        else f"device {size(held)}, pages {size(tiers.pages[name])} of {size(tiers.caps[name])}"
        for name, held in tiers.held.items()
        if tiers.caps[name] or held
    )
    hits = ", ".join(f"{count:,} {name}" for name, count in tiers.hits.items() if count)
    return f"Tiers: {'; '.join(places)}. Pages read: {hits or 'none'}; {'; '.join(_rest(tiers))}."


def _rest(tiers: TierFigures) -> Iterator[str]:
    yield f"waited {tiers.stalls:.3f} s"
    if tiers.direct is not None:
        kind = "past the page cache" if tiers.direct else "through the page cache"
        written, read = tiers.ways["host to disk"].bytes, tiers.ways["disk to host"].bytes
        yield f"disk {kind}: {size(written)} written, {size(read)} read, all verified"
    if tiers.failures:
        wrong = tiers.integrity_failures
        yield f"{tiers.failures} reads or writes failed, {wrong} for what was read"


def notes(tiers: TierFigures) -> Iterator[str]:
    """A line where computing anew what is in lower tiers would be faster than reading it."""
    if tiers.reading is not None and 0 < tiers.prompt < tiers.reading:
        yield (
            "Recomputing the prompt would have been faster than reading it back: reading all pages"
            f" of the lower tiers once takes about {tiers.reading:.2f} s at the rates measured so"
            f" far, and the prompt took {tiers.prompt:.2f} s. Give the upper tiers more bytes, or"
            " use a faster disk."
        )
