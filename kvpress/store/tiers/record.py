"""Records: the same span of all heads of a sequence, with a header that says whose they are.

    header, a multiple of 4096 bytes | n slices of equal length, without gaps | zeros up to 4096

The same bytes stand in the host arena and on the disk. They are written once. What they must be is
also kept in memory: the xxh3-128 of each slice and of the whole, header and zeros included. So
bytes of another generation, place, head, layer, store or process are found by their digest alone,
and the header is read only to say what they really are.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import xxhash

from kvpress.formulas.sizes import round_up
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.jobs import Job
from kvpress.store.tiers.reading import ReadFile

LAYOUT = 1  # version of the header and of what stands behind it
_MAGIC = b"KVPTIER\0"
# magic, layout; store, facts; number, generation; layer, part, sequence, first, length; n, bytes
_FIXED = struct.Struct("<8sQ16s16s2Q5q2Q")
_SEAL = 16  # bytes of the header's own digest, at its end


class Owner(NamedTuple):
    """Whose bytes a record holds."""

    layer: int
    part: int
    sequence: int
    heads: tuple[int, ...]  # of the slices, in order
    first: int  # position or slot
    length: int  # slots of a slice


class Entry(NamedTuple):
    """A record in a file, as whoever names it must know it."""

    place: int
    owner: Owner
    slice_bytes: int
    digests: tuple[bytes, ...]  # xxh3-128 of each slice
    digest: bytes  # xxh3-128 of the whole


@dataclass(frozen=True)
class Facts:
    """What is the same for all records of a store, and must be so for whoever reads them.

    text: versions of engine and layout, policy, geometry, dtype, formats, rotary settings.
    """

    text: str

    @cached_property
    def digest(self) -> bytes:
        """The xxh3-128 of the text: 16 bytes."""
        return xxhash.xxh3_128_digest(self.text.encode())


class State(enum.Enum):
    """What a tier holds of a record. Only what is SEALED is read, or is a copy to rely on."""

    ABSENT = "absent"
    RESERVED = "reserved"  # it has a place
    FILLING = "filling"  # bytes are on their way to it
    SEALED = "sealed"  # all bytes are there
    EVICTING = "evicting"  # the place is about to be freed


class Copy:
    """A record in one tier. pins: its readers, and reads that were given up but have not ended."""

    __slots__ = ("pins", "place", "state")

    def __init__(self) -> None:
        self.state, self.place, self.pins = State.ABSENT, -1, 0

    @property
    def sealed(self) -> bool:
        """Whether it is one to read."""
        return self.state is State.SEALED


class Region:
    """Slices of a record in the space that reads pass through, and where each begins there."""

    __slots__ = ("begins", "pins", "place", "record", "size")

    def __init__(self, record: Record, place: int, size: int, begins: dict[int, int]) -> None:
        self.record, self.place, self.size, self.begins, self.pins = record, place, size, begins, 0


class Record:
    """An entry of the vault, compared by identity. `number` is used again with a new generation."""

    def __init__(self, number: int, generation: int, owner: Owner, slice_bytes: int) -> None:
        self.number, self.generation, self.owner = number, generation, owner
        self.slices, self.slice_bytes = len(owner.heads), slice_bytes
        self.host, self.disk, self.saved = Copy(), Copy(), Copy()
        self.kept: dict[int, Region] = {}  # by slice: what was read lately
        self.file: ReadFile | None = None  # in which the saved copy lies: that of a session
        self.digests: tuple[bytes, ...] = ()  # xxh3-128 of each slice
        self.digest = b""  # xxh3-128 of the whole, header and zeros included
        self.write: Job | None = None  # makes the copy on the disk
        self.published = self.freed = False
        self.header_bytes = header_bytes(self.slices)
        self.bytes = round_up(self.header_bytes + self.slices * slice_bytes, UNIT)

    @property
    def pins(self) -> int:
        return self.host.pins + self.disk.pins + self.saved.pins

    def begin(self, index: int) -> int:
        """Where a slice begins, in bytes from the begin of the record."""
        return self.header_bytes + index * self.slice_bytes

    def begins(self, place: int, slices: Sequence[int]) -> Sequence[int]:
        """Where slices begin, in bytes, when the record lies at `place`."""
        if isinstance(slices, range):
            step = slices.step * self.slice_bytes
            first = place + self.begin(slices[0])
            return range(first, first + len(slices) * step, step)
        return [place + self.begin(i) for i in slices]

    def __repr__(self) -> str:
        return (
            f"record {self.number} (generation {self.generation}, {self.owner},"
            f" {self.slices} × {self.slice_bytes} bytes)"
        )

    def seal(self, image: memoryview, store: bytes, facts: bytes) -> None:
        """Completes the bytes of a record whose slices are in place, and keeps their digests."""
        begins = [self.begin(i) for i in range(self.slices + 1)]
        self.digests = tuple(
            xxhash.xxh3_128_digest(image[at : at + self.slice_bytes]) for at in begins[:-1]
        )
        image[begins[-1] :] = bytes(self.bytes - begins[-1])
        image[: self.header_bytes] = self._header(store, facts)
        self.digest = xxhash.xxh3_128_digest(image)

    def _header(self, store: bytes, facts: bytes) -> bytes:
        owner, numbers = self.owner, (self.number, self.generation)
        place = (owner.layer, owner.part, owner.sequence, owner.first, owner.length)
        fixed = _FIXED.pack(
            _MAGIC, LAYOUT, store, facts, *numbers, *place, self.slices, self.slice_bytes
        )
        heads = struct.pack(f"<{self.slices}q", *owner.heads)
        text = b"".join((fixed, heads, *self.digests)).ljust(self.header_bytes - _SEAL, b"\0")
        return text + xxhash.xxh3_128_digest(text)


def header_bytes(slices: int) -> int:
    """Bytes of the header of a record of so many slices."""
    return round_up(_FIXED.size + slices * (8 + 16) + _SEAL, UNIT)


def describe(found: bytes, store: bytes) -> str:
    """What a header says of the record that it belongs to, for an error message.

    store: the id of the store that asks.
    """
    if len(found) < _FIXED.size or not found.startswith(_MAGIC):
        return "there is no header of a record"
    _, layout, whose, _, *rest = _FIXED.unpack_from(found)
    number, generation, layer, part, sequence, first, length, slices, size = rest
    whole = header_bytes(slices) if layout == LAYOUT and slices < 2**32 else 0
    text, seal = found[: whole - _SEAL], found[whole - _SEAL : whole]
    if not whole or xxhash.xxh3_128_digest(text) != seal:
        return "the header is damaged: its own checksum is wrong"
    heads = struct.unpack_from(f"<{slices}q", found, _FIXED.size)
    owner = Owner(layer, part, sequence, heads, first, length)
    of = "this store" if whose == store else f"the store {whose.hex()}, not {store.hex()}"
    return (
        f"the header is that of record {number} (generation {generation}, {owner}, {slices} ×"
        f" {size} bytes) of {of}"
    )
