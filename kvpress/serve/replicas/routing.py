"""Which replica serves a request: the one that has read how it begins, or the least busy one."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import NamedTuple

_REMEMBERED = 4096  # beginnings of prompts
_MOST_PARTS = 64  # of a prompt that are looked at
SLACK = 8192  # tokens by which a replica may be busier before another one reads a beginning anew


class Load(NamedTuple):
    """How busy a replica is, counted by who sends it requests: it is never out of date.

    number: of the replica. promised: bytes that its requests, waiting ones too, may come to hold.
    tokens: of these requests, prompts and answers. capacity: bytes; None: no cap. full: whether so
    many wait there that it takes no more.
    """

    number: int
    promised: int = 0
    tokens: int = 0
    capacity: int | None = None
    full: bool = False

    def has_room(self, needed: int) -> bool:
        """Whether a request of so many bytes would run at once."""
        return self.capacity is None or self.promised + needed <= self.capacity


def beginnings(family: str, ids: Sequence[int], chunk: int) -> tuple[bytes, ...]:
    """A hash of each beginning of a prompt that a replica may know, shortest first.

    family: what else must be alike, the tenant and the policy with its budget. chunk: tokens of the
    parts that are shared; 0: none are. The last part is never shared, whole or not.
    """
    if chunk < 1:
        return ()
    running = hashlib.blake2b(family.encode("utf-8", "surrogatepass"), digest_size=16)
    found = []
    for end in range(chunk, len(ids), chunk)[:_MOST_PARTS]:
        running.update(array("q", ids[end - chunk : end]).tobytes())
        found.append(running.digest())
    return tuple(found)


class Router:
    """Chooses replicas, and remembers which one served how a prompt begins."""

    def __init__(self, slack: int = SLACK) -> None:
        self._served: OrderedDict[bytes, int] = OrderedDict()
        self._slack = slack

    def order(
        self, loads: Sequence[Load], starts: Sequence[bytes] = (), needed: int = 0
    ) -> list[int]:
        """The replicas that take a request, best first; none: all are full.

        Who knows the longest beginning goes first, unless the request would wait for room there but
        not elsewhere, or its tokens are twice those of the least busy one and `slack` more. Others
        follow by room, then by bytes promised, then by tokens.
        """
        ready = {load.number: load for load in loads if not load.full}
        if not ready:
            return []
        ranked = sorted(
            ready.values(),
            key=lambda x: (not x.has_room(needed), x.promised, x.tokens, x.number),
        )
        order = [load.number for load in ranked]
        known = ready.get(self._knows(starts, ready))
        if known is None:
            return order
        least = min(load.tokens for load in ranked)
        waits = not known.has_room(needed) and ranked[0].has_room(needed)
        if waits or known.tokens > 2 * least + self._slack:
            return order
        return [known.number, *(number for number in order if number != known.number)]

    def _knows(self, starts: Sequence[bytes], ready: Container[int]) -> int:
        """The replica that served the longest beginning; -1: nobody."""
        for start in reversed(starts):
            number = self._served.get(start, -1)
            if number in ready:
                return number
        return -1

    def note(self, starts: Sequence[bytes], number: int) -> None:
        """Remembers who serves a prompt that begins like this."""
        for start in starts:
            self._served[start] = number
            self._served.move_to_end(start)
        while len(self._served) > _REMEMBERED:
            self._served.popitem(last=False)

    def forget(self, number: int) -> None:
        """Forgets a replica that has ended, and what it had read."""
        for start in [start for start, own in self._served.items() if own == number]:
            del self._served[start]
