"""Who comes next, and who makes room for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from kvpress.batching.handle import Handle
from kvpress.batching.order import Order
from kvpress.batching.parking import Parking
from kvpress.batching.prefixes import Prefixes
from kvpress.batching.reserving import Reserving
from kvpress.batching.text import Text
from kvpress.errors import CacheError

_LOG = logging.getLogger("kvpress")


class Admission:
    """Requests that wait, those that were put aside, and the room that there is.

    Room is made in this order: prefixes that nobody uses are forgotten; then requests of lower
    priority are put aside, the youngest first; then one waits. What was put aside comes back before
    anything new of its own priority or a lower one.

    patience: seconds for which smaller requests may overtake one that finds no room.
    """

    def __init__(
        self, reserving: Reserving, prefixes: Prefixes, parking: Parking, patience: float
    ) -> None:
        self.order, self.aside = Order(), list[Text]()
        self.reserving, self.prefixes, self.parking = reserving, prefixes, parking
        self._patience = patience
        self._blocked: tuple[int, float] | None = None  # the next request, and since when

    def next(self, running: list[Text]) -> Text | Handle | None:
        """Who comes now: a request that was put aside, or a new one. None: nobody finds room.

        running: those that are served; who makes room goes from it to those put aside.
        """
        heads = self.order.heads()
        first = max(self.aside, key=_rank, default=None)
        if heads and (first is None or heads[0].request.priority > first.request.priority):
            return self._new(heads[0], running)
        if first is None:
            return None
        if not self.makes_room(first.reserved, first.request.priority, running):
            return None
        self.aside.remove(first)
        return first

    def _new(self, first: Handle, running: list[Text]) -> Handle | None:
        if self.makes_room(first.needed, first.request.priority, running):
            self._blocked = None
            return first
        now = time.monotonic()
        if self._blocked is None or self._blocked[0] != first.number:
            self._blocked = (first.number, now)
        if self.aside or now - self._blocked[1] > self._patience:
            return None
        return next((x for x in self.order if self.reserving.fits(x.needed)), None)

    def makes_room(self, needed: int, priority: int, running: list[Text]) -> bool:
        """Makes room for so many bytes if that is possible; otherwise nobody is put aside."""
        while not self.reserving.fits(needed) and self.prefixes.drop():
            pass
        if self.reserving.fits(needed):
            return True
        lower = [text for text in running if text.request.priority < priority]
        return self.puts_aside(needed, sorted(lower, key=_rank), running)

    def puts_aside(self, needed: int, victims: Sequence[Text], running: list[Text]) -> bool:
        """Puts some of these aside, in their order, until so many bytes find room; or nobody."""
        chosen, free = [], self.reserving.free
        for text in victims:
            if free < needed and text.is_read and self.parking.fits(text.cache.nbytes):
                chosen.append(text)
                free += text.reserved
        if free < needed:
            return False
        for text in chosen:
            if self.parking.fits(text.cache.nbytes):
                self._put_aside(text, running)
        return self.reserving.fits(needed)

    def _put_aside(self, text: Text, running: list[Text]) -> None:
        try:
            text.park(self.parking)
        except (CacheError, OSError) as error:  # a disk that is full: it goes on, others wait
            _LOG.warning("A request could not be put aside: %s", error)
            return
        running.remove(text)
        self.reserving.give_back(text.reserved)
        self.aside.append(text)


def _rank(text: Text) -> tuple[int, int]:
    """Larger: goes first, and makes room last."""
    return text.request.priority, -text.handle.number
