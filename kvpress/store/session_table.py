"""Records of a session as tensors of its manifest, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.store.tiers.record import Entry, Owner

DIGEST = 16  # bytes
_OWNER = 5  # numbers of an owner besides its heads
FIXED = 3 + _OWNER  # place, bytes of a slice, and whether it may be in a lower tier, before them


def table(entries: list[Entry], lower: list[bool]) -> dict[str, Tensor]:
    """Records as tensors: numbers, then heads and digests of slices one behind the other."""
    numbers = [
        [x.place, x.slice_bytes, int(low), *_besides(x.owner), len(x.owner.heads)]
        for x, low in zip(entries, lower, strict=True)
    ]
    digests = b"".join(x.digest for x in entries)
    slices = b"".join(digest for x in entries for digest in x.digests)
    return {
        "record.numbers": host.tensor(numbers).view(len(entries), FIXED + 1),
        "record.heads": host.tensor([head for x in entries for head in x.owner.heads]),
        "record.digest": _bytes(digests),
        "record.slices": _bytes(slices),
    }


def _besides(owner: Owner) -> tuple[int, ...]:
    return owner.layer, owner.part, owner.sequence, owner.first, owner.length


def _bytes(data: bytes) -> Tensor:
    found = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else host.zeros(0)
    return found.to(torch.uint8).view(-1, DIGEST)


def entries_of(own: Mapping[str, Tensor]) -> list[Entry]:
    numbers, heads = own["record.numbers"].tolist(), own["record.heads"].tolist()
    digest = own["record.digest"].numpy().tobytes()
    slices = own["record.slices"].numpy().tobytes()
    counts = [row[-1] for row in numbers]
    alike = len(heads) * DIGEST == len(slices) and len(numbers) * DIGEST == len(digest)
    if not alike or min(counts, default=1) < 1 or sum(counts) != len(heads):
        raise CacheError(f"{len(numbers)} records do not have {len(heads)} slices.")
    entries, at = [], 0
    for number, (place, size, _, *besides, count) in enumerate(numbers):
        layer, part, sequence, first, length = besides
        owner = Owner(layer, part, sequence, tuple(heads[at : at + count]), first, length)
        each = range(at * DIGEST, (at + count) * DIGEST, DIGEST)
        digests = tuple(slices[i : i + DIGEST] for i in each)
        whole = digest[number * DIGEST : (number + 1) * DIGEST]
        entries.append(Entry(place, owner, size, digests, whole))
        at += count
    return entries
