"""Reads that are under way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from kvpress.errors import TierError, TierTimeoutError
from kvpress.store.tiers.jobs import Job
from kvpress.store.tiers.loads import Plan
from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Record


class Ticket:
    """A read of some slices of a record, from the host or from the disk.

    It ends with `release`, also as a context, or when `wait` raises. What it reads is pinned until
    then. A read that was given up keeps its pin and its space until it has really ended: nobody
    else may use what the operating system still writes to. keep: what was read stays at hand.
    """

    def __init__(
        self,
        parts: Parts,
        record: Record,
        slices: Sequence[int],
        deadline_s: float,
        keep: bool = False,
    ) -> None:
        self._parts, self._record, self._deadline_s = parts, record, deadline_s
        self._over = self._given = False
        self._keep = keep
        self.job: Job | None = None
        self._copy = record.host
        if record.host.sealed:
            self._begins = record.begins(record.host.place, slices)
        else:
            self._copy, file = parts.below(record)
            self._plan = plan = Plan(record, slices, self._copy, file)
            self.job = Job(parts.loader.load, self._may_begin, self._ended, plan, plan.bytes)
        self._copy.pins += 1

    @property
    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self.job is None or self.job.done

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """The slices, uint8 `[A, slice_bytes]` on the host, until `release`; not to be written to.

        Raises what `begins` does.
        """
        begins = self.begins(timeout_s)
        return self._parts.arena.rows(begins, self._record.slice_bytes)

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
                raise TierError(f"The ticket of {self._record} has ended. Fetch it again.")
            return self._begins

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
                f"{self._record} was not read within {timeout_s} s. The disk is slow or hangs, or"
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
        self._plan.place = self._parts.take_bounce(self._plan.bytes)
        if self._plan.place >= 0:
            self._begins = self._plan.begins()
        return self._plan.place >= 0

    def _ended(self, error: BaseException | None) -> None:
        self._parts.counters.failures += error is not None and not self._over
        if self._over or error is not None:
            self._give()

    def _give(self) -> None:
        if self._given:
            return
        self._given = True
        if self.job is not None and self._plan.place >= 0:
            job, wanted = self.job, self._keep and not self._record.freed
            if wanted and job.done and not job.cancelled and job.error is None:
                self._parts.keep(self._plan)
            else:
                self._parts.give_bounce(self._plan.place)
        self._copy.pins -= 1
        self._parts.placement.settle(self._record)
        self._parts.jobs.told()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
