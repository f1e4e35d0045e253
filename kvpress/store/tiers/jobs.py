"""Jobs of a store: a few threads that read before they write, and read what is urgent first.

Everything that a store knows is guarded by the one lock of its jobs. A job itself runs without it.
What a job raises reaches whoever waits for it. A job that nobody wants any more is dropped if it
has not begun; one that has begun ends by itself, and until then keeps what it works on.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvpress.errors import TierError

TOGETHER = 1 << 20  # bytes of reads that one call makes
Run = Callable[[list[Any]], Sequence[BaseException | None]]


class Job:
    """One read or write.

    run: does it, without the lock. It gets the `item`, with those of other reads of the same `run`
    and priority if they are small, and gives an error or None for each. may_begin: takes what a
    read needs; False if that is not there yet. A write has what it needs. ended: called once, with
    the error or None, when the job has run or was dropped. Both hold the lock. size: in bytes.
    """

    def __init__(
        self,
        run: Run,
        may_begin: Callable[[], bool] = lambda: True,
        ended: Callable[[BaseException | None], None] = lambda error: None,
        item: Any = None,
        size: int = TOGETHER,
    ) -> None:
        self.run, self.may_begin, self.ended = run, may_begin, ended
        self.item, self.size = item, size
        self.begun = self.done = self.cancelled = False
        self.error: BaseException | None = None

    @classmethod
    def nothing(cls) -> Job:
        """A job that has ended."""
        job = cls(lambda items: [])
        job.begun = job.done = True
        return job


class Jobs:
    """The queues and their threads. One thread at least never writes, if there are two."""

    def __init__(self, workers: int) -> None:
        self.lock = threading.RLock()
        self._work, self._news = (threading.Condition(self.lock) for _ in range(2))
        self._loads: list[tuple[int, int, Job]] = []
        self._stores: deque[Job] = deque()
        self._order = itertools.count()
        self._storing, self._most_storing, self._closed = 0, max(1, workers - 1), False
        self._threads = [
            threading.Thread(target=self._serve, name=f"kvpress-tier-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def load(self, job: Job, priority: int) -> None:
        """Queues a read: lower numbers first, then as they came."""
        with self.lock:
            heapq.heappush(self._loads, (priority, next(self._order), job))
            self._work.notify()

    def store(self, job: Job) -> None:
        """Queues a write, behind all reads."""
        with self.lock:
            self._stores.append(job)
            self._work.notify()

    def cancel(self, job: Job) -> bool:
        """Drops a job that has not begun; False if it has."""
        with self.lock:
            if job.begun:
                return False
            job.cancelled = job.begun = True
            self._end(job, TierError("It was dropped before it began: nobody waited any more."))
            return True

    def wait(self, until: Callable[[], bool], timeout_s: float) -> bool:
        """Waits, at most so long, until something is so; whether it is."""
        with self.lock:
            return self._news.wait_for(until, timeout_s)

    def told(self) -> None:
        """Something has changed that jobs or others may wait for."""
        with self.lock:
            if self._loads or self._stores:
                self._work.notify()
            self._news.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Drops what has not begun and waits for the threads; whether all have ended."""
        with self.lock:
            self._closed = True
            for job in (*(job for _, _, job in self._loads), *self._stores):
                self.cancel(job)
            self._work.notify_all()
        until = time.monotonic() + timeout_s
        others = [t for t in self._threads if t is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _serve(self) -> None:
        while True:
            with self.lock:
                while (found := self._next()) is None and not self._closed:
                    self._work.wait()
                if found is None:
                    return
                if self._loads or self._stores:
                    self._work.notify()  # for another thread: it may begin too
            self._run(*found)
            del found  # an idle thread must not keep a store alive

    def _run(self, jobs: list[Job], stores: bool) -> None:
        try:
            errors = jobs[0].run([job.item for job in jobs])
        except BaseException as error:
            errors = [error] * len(jobs)
        with self.lock:
            self._storing -= stores
            for job, failed in zip(jobs, errors, strict=True):
                self._end(job, failed)

    def _end(self, job: Job, error: BaseException | None) -> None:
        job.error = error
        job.ended(error)
        job.done = True
        self._news.notify_all()

    def _next(self) -> tuple[list[Job], bool] | None:
        """What may begin next, and whether it is a write."""
        loads = self._next_loads()
        if loads:
            return loads, False
        while self._stores and self._storing < self._most_storing:
            job = self._stores.popleft()
            if not job.cancelled:
                job.may_begin()
                self._storing += 1
                job.begun = True
                return [job], True
        return None

    def _next_loads(self) -> list[Job]:
        """The most urgent read, with others that one call can make beside it.

        It is not overtaken where it may not begin yet: what is less urgent would take its space.
        """
        loads: list[Job] = []
        room, most = TOGETHER, -(-len(self._loads) // max(1, len(self._threads)))
        urgency = self._loads[0][0] if self._loads else 0
        while self._loads and len(loads) < most:
            priority, _, job = self._loads[0]
            if not job.cancelled:
                alike = not loads or (priority == urgency and job.run == loads[0].run)
                if not alike or (loads and job.size > room) or not job.may_begin():
                    break
                job.begun = True
                room -= job.size
                loads.append(job)
            heapq.heappop(self._loads)
        return loads
