"""Prefixes that several prompts begin with: read once, and copied from then on."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvpress.batching.reserving import Reserving
from kvpress.hf.cache import EngineCache

_REMEMBERED = 4096  # prefixes that were met once


class Known(NamedTuple):
    """A prefix that is kept: the cache behind it, its tokens, and its bytes."""

    cache: EngineCache
    tokens: int
    nbytes: int


def apart(cache: EngineCache) -> EngineCache:
    """A copy of a cache; both then have pages of their own."""
    copied = cache.fork()
    cache.unshare()
    copied.unshare()
    return copied


class Prefixes:
    """Caches behind first chunks of prompts that came more than once, the least used go first.

    What a cache holds behind k chunks depends on their tokens alone: prompts that begin alike go on
    from a copy. Each has pages of its own: a pool that several grow is nobody's to give back, so
    that what a request may come to hold could not be foreseen. They take room of the cap only where
    no request wants it.

    most: bytes of all of them. nbytes: that they hold.
    """

    def __init__(self, chunk: int, most: int, reserving: Reserving) -> None:
        self._chunk, self._most, self._reserving = chunk, most, reserving
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._met: OrderedDict[bytes, None] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._known)

    @property
    def shared_chunk(self) -> int:
        """Tokens of a part; 0: nothing is kept."""
        return self._chunk if self._most else 0

    def longest(self, start: str, ids: Sequence[int]) -> Known | None:
        """The longest known prefix of a prompt, not all of it. start: what else must be alike."""
        found = None
        for key in self._keys(start, ids):
            if key in self._known:
                found = key
        if found is None:
            return None
        self._known.move_to_end(found)
        return self._known[found]

    def note(self, start: str, ids: Sequence[int], fed: int, cache: EngineCache) -> None:
        """To be called behind each chunk of a prompt: keeps a copy if the prefix came before."""
        if not self._most or fed % self._chunk or fed >= len(ids):
            return
        key = self._keys(start, ids)[fed // self._chunk - 1]
        if key in self._known:
            return
        if key not in self._met:
            self._met[key] = None
            if len(self._met) > _REMEMBERED:
                self._met.popitem(last=False)
            return
        expected = cache.nbytes
        while self._known and self.nbytes + expected > self._most:
            self.drop()
        if self.nbytes + expected > self._most or not self._reserving.fits(expected):
            return
        copied = apart(cache)
        if self._reserving.fits(nbytes := copied.nbytes):
            self._reserving.promise(nbytes)
            self._known[key] = Known(copied, fed, nbytes)
            self.nbytes += nbytes

    def drop(self) -> bool:
        """Forgets the prefix that was used the longest time ago. False: there is none."""
        if not self._known:
            return False
        _, known = self._known.popitem(last=False)
        self._reserving.give_back(known.nbytes)
        self.nbytes -= known.nbytes
        return True

    def _keys(self, start: str, ids: Sequence[int]) -> list[bytes]:
        """Of every whole chunk that is not the end: a hash of all tokens up to it."""
        if not self._most:
            return []
        running = hashlib.blake2b(start.encode(), digest_size=16)
        keys = []
        for end in range(self._chunk, len(ids), self._chunk):
            part = ids[end - self._chunk : end]
            running.update(b"".join(token.to_bytes(4, "little") for token in part))
            keys.append(running.digest())
        return keys
