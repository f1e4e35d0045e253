"""Reads that are under way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from kvpress.errors import TierError, TierTimeoutError
from kvpress.formulas.sizes import round_up
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.jobs import TOGETHER, Job
from kvpress.store.tiers.loads import Plan
from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Copy, Record


class Wanted(NamedTuple):
    """Slices of a record to be read. keep: what was read stays at hand."""

    record: Record
    slices: Sequence[int]
    keep: bool = False

    @property
    def most_bytes(self) -> int:
        """Bytes of the arena that this needs, at the most."""
        each = round_up(self.record.slice_bytes, UNIT) + UNIT
        return min(self.record.bytes, len(self.slices) * each)


class Ticket:
    """A read of some slices of records, from the host or from the disk.

    It ends with `release`, also as a context, or when `wait` raises. What it reads is pinned until
    then. A read that was given up keeps its pins and its space until it has really ended: nobody
    else may use what the operating system still writes to.
    """

    def __init__(self, parts: Parts, wanted: Sequence[Wanted], deadline_s: float) -> None:
        self.wanted, self._parts, self._deadline_s = wanted, parts, deadline_s
        self._over = self._given = False
        self.job: Job | None = None
        self._plans: list[Plan] = []
        self._sources: list[tuple[Wanted, Copy, Plan | None]] = []
        for own in wanted:
            copy, plan = own.record.host, None
            if copy.sealed:
                parts.placement.touch(own.record)
                parts.counters.hits += 1
                parts.counters.from_host.add(len(own.slices) * own.record.slice_bytes)
            else:
                copy, file = parts.below(own.record)
                plan = Plan(own.record, own.slices, copy, file)
                self._plans.append(plan)
            copy.pins += 1
            self._sources.append((own, copy, plan))
        if self._plans:
            size = sum(plan.bytes for plan in self._plans)
            self.job = Job(parts.loader.load, self._may_begin, self._ended, self._plans, size)

    @property
    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self.job is None or self.job.done

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """The slices, uint8 `[A, slice_bytes]` on the host, until `release`; not to be written to.

        They are of equal size. Raises what `begins` does.
        """
        begins = self.begins(timeout_s)
        return self._parts.arena.rows(begins, self.wanted[0].record.slice_bytes)

    def begins(self, timeout_s: float | None = None) -> Sequence[int]:
        """Where in the arena the slices begin, until `release`.

        Waits for them until the deadline of the read has passed since this call, or `timeout_s`.
        Raises TierTimeoutError then, TierIntegrityError where the disk does not hold what was
        written, TierError where it cannot be read, or where the ticket has ended.
        """
        with self._parts.jobs.lock:
            if not self._over and self.job is not None:
                self._wait(self.job, self._deadline_s if timeout_s is None else timeout_s)
            if self._over:
                raise TierError(f"The ticket of {self._name} has ended. Fetch it again.")
            found = [
                plan.begins() if plan else own.record.begins(copy.place, own.slices)
                for own, copy, plan in self._sources
            ]
            return found[0] if len(found) == 1 else list(chain.from_iterable(found))

    @property
    def _name(self) -> str:
        more = len(self.wanted) - 1
        return f"{self.wanted[0].record}" + (f" and {more} more" if more else "")

    def _wait(self, job: Job, timeout_s: float) -> None:
        counters, begun = self._parts.counters, time.perf_counter()
        if not job.done:
            self._parts.jobs.wait(lambda: job.done or self._over, timeout_s)
            counters.stalls += time.perf_counter() - begun
        if not job.done and not self._over:
            self.release()
            counters.timeouts += 1
            counters.failures += 1
            raise TierTimeoutError(
                f"{self._name} was not read within {timeout_s} s. The disk is slow or hangs, or"
                f" tickets that were not released hold the space that reads need"
                f" ({self._parts.bounce.held} of {self._parts.bounce.size} bytes)."
            )
        if job.error is not None:
            self._over = True
            raise job.error

    def cancel(self) -> None:
        """Nobody wants the read any more: the same as `release`."""
        self.release()

    def release(self) -> None:
        """Ends the ticket; a second call does nothing."""
        with self._parts.jobs.lock:
            self._over = True
            if self.job is not None and not self.job.done and not self._parts.jobs.cancel(self.job):
                return  # it is being read: `_ended` gives back
            self._give()

    def _may_begin(self) -> bool:
        places = self._parts.take_places([plan.bytes for plan in self._plans])
        for plan, place in zip(self._plans, places, strict=False):
            plan.place = place
        return bool(places)

    def _ended(self, error: BaseException | None) -> None:
        self._parts.counters.failures += error is not None and not self._over
        if self._over or error is not None:
            self._give()

    def _give(self) -> None:
        if self._given:
            return
        self._given = True
        job, parts = self.job, self._parts
        whole = job is not None and job.done and not job.cancelled and job.error is None
        for own, copy, plan in self._sources:
            if plan is not None and plan.place >= 0:
                if whole and own.keep and not own.record.freed:
                    parts.keep(plan)
                else:
                    parts.give_bounce(plan.place)
            copy.pins -= 1
            parts.placement.settle(own.record)
        parts.jobs.told()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def ask(parts: Parts, wanted: Sequence[Wanted], deadline_s: float, priority: int = 0) -> Ticket:
    """Begins to read; the caller holds the lock.

    Raises TierError for a record or a slice that is not there.
    """
    for record, slices, _ in wanted:
        parts.placement.known(record)
        if not slices or min(slices) < 0 or max(slices) >= record.slices:
            raise TierError(f"Slices {list(slices)} of {record}: allowed are 0 to n - 1.")
    ticket = Ticket(parts, wanted, deadline_s)
    if ticket.job is not None:
        parts.jobs.load(ticket.job, priority)
    return ticket


def ask_all(parts: Parts, wanted: Sequence[Wanted], calls: int) -> list[Ticket]:
    """The same of many, by as many reads as threads do at a time, or more that are not too large.

    None begins before all are asked for. Whatever fails, nothing stays pinned.
    """
    tickets: list[Ticket] = []
    try:
        for some in groups(wanted, calls, min(TOGETHER, parts.bounce.size // 4)):
            tickets.append(ask(parts, some, parts.deadline_s))
    except BaseException:
        for ticket in tickets:
            ticket.release()
        raise
    return tickets


def groups(wanted: Sequence[Wanted], calls: int, most_bytes: int) -> Iterator[list[Wanted]]:
    """What is read together: in so many groups, or in more where they are of too many bytes."""
    most, some, size = -(-len(wanted) // max(1, calls)), list[Wanted](), 0
    for own in wanted:
        if some and (len(some) == most or size + own.most_bytes > most_bytes):
            yield some
            some, size = [], 0
        some.append(own)
        size += own.most_bytes
    if some:
        yield some
