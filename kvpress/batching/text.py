"""One request that is being served: its cache, how far it is, and what it may take."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from kvpress.batching.handle import Event, Handle
from kvpress.batching.parking import Parked, Parking
from kvpress.batching.request import Completion, Drawn
from kvpress.hf.cache import EngineCache
from kvpress.hf.drawing import Drawer

_LONGEST_TOKEN = 16  # more tokens, so that none of the text begins amid a character


class Text:
    """The text of a request, and the cache that holds it.

    make: an empty cache for it. ids: prompt and drawn tokens. fed: of these, in the cache.
    reserved: bytes that the cache may come to hold. decode: texts of ids.
    """

    def __init__(
        self,
        handle: Handle,
        make: Callable[[], EngineCache],
        drawer: Drawer,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.handle, self.request, self.usage = handle, handle.request, handle.usage
        self.cache, self.drawer, self.reserved = make(), drawer, handle.needed
        self._make = make
        self._parked: Parked | None = None
        self.ids, self.fed, self._decode = list(self.request.ids), 0, decode
        self.usage.queue_seconds = self.handle.age
        self.last_at = time.monotonic()  # when the last token came

    def begin(self, cache: EngineCache, tokens: int) -> None:
        """Goes on from a cache that holds the first tokens of its prompt."""
        cache.expect(self.request.max_new_tokens)
        self.cache, self.fed, self.usage.cached_tokens = cache, tokens, tokens

    @property
    def is_read(self) -> bool:
        """Whether its prompt is in the cache."""
        return self.fed >= len(self.request.ids)

    @property
    def decodes(self) -> bool:
        """Whether it takes part in the next decode step."""
        return self.is_read and not self.handle.is_paused

    def chunk(self, size: int) -> list[int]:
        """The next part of its prompt. Where parts end depends on the prompt alone."""
        end = min(self.fed + size, len(self.request.ids))
        return self.ids[self.fed : end]

    def take(self, logits_V: Tensor, likeliest: int) -> str | None:
        """Draws a token and hands it out. Returns why the text ends with it; None: it goes on."""
        drawn = Drawn(likeliest) if self.drawer.is_plain else self.drawer.draw(self.ids, logits_V)
        self.ids.append(drawn.token)
        usage = self.usage
        usage.completion_tokens += 1
        if usage.first_token_seconds is None:
            usage.first_token_seconds = self.handle.age
        self.handle.deliver(Event((drawn,)))
        if drawn.token in self.request.ends or self._met_stop():
            return "stop"
        return "length" if usage.completion_tokens >= self.request.max_new_tokens else None

    def _met_stop(self) -> bool:
        """Whether the newest token completed a text that ends it."""
        stop = self.request.stop
        if not stop:
            return False
        # A token is a byte at least, and a character four bytes at most.
        longest = 4 * max(len(text) for text in stop) + _LONGEST_TOKEN
        drawn = self.ids[len(self.request.ids) :]
        tail = self._decode(drawn[-longest:])
        return any(text in tail for text in stop)

    def end(self, reason: str) -> None:
        """Tells the caller that it is over."""
        if self._parked is None:  # otherwise noted when it was put aside
            self.note()
        self.usage.seconds = self.handle.age
        drawn = tuple(self.ids[len(self.request.ids) :])
        self.handle.deliver(Event(completion=Completion(drawn, reason, self.usage)))

    def fail(self, error: Exception) -> None:
        """Tells the caller that it failed. What its cache holds is not asked: it may be torn."""
        self.usage.seconds = self.handle.age
        self.handle.deliver(Event(error=error))

    def park(self, parking: Parking) -> None:
        """Puts its cache aside. Raises CacheFileError, and nothing has changed then."""
        self.note()
        self._parked = parking.put(self.cache)
        self.cache = self._make()
        self.usage.preempted += 1

    def resume(self, parking: Parking) -> None:
        """Takes its cache back. Raises CacheFileError for a file that is damaged."""
        parked, self._parked = self._parked, None
        assert parked is not None, "it was put aside"
        parking.back(parked, self.cache)

    def forget(self, parking: Parking) -> None:
        """Lets go of what was put aside."""
        if self._parked is not None:
            parking.drop(self._parked)

    def note(self) -> None:
        """Writes down what its cache holds."""
        report, usage = self.cache.report(), self.usage
        rows = [row for layer in report.layers for row in layer.slots_kept[0]]
        usage.slots_kept, usage.slots_full = sum(rows), len(rows) * report.tokens_seen[0]
        usage.bytes_held, usage.bytes_full = report.bytes_held, report.bytes_full
        usage.bytes_peak = max(usage.bytes_peak, report.bytes_peak)
