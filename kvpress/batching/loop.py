"""The thread that owns the model, all caches and all pages: others hand things in and out."""

from __future__ import annotations

import logging
import queue
import threading
import time

from kvpress.batching.handle import Handle
from kvpress.batching.stepper import Stepper
from kvpress.errors import ServingError

_LOG = logging.getLogger("kvpress")
_LOOKS = 0.05  # seconds after which what waits for room, or is paused, is looked at again


class Loop:
    """Steps while there is something to do, and rests otherwise.

    lock: for who must see, and change, what waits. error: what ended it. closing: whether it is to
    end. arriving: requests that were handed in and not looked at.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.lock = threading.Condition()
        self.error: Exception | None = None
        self.closing, self.arriving = False, 0
        self._stepper, self._news = stepper, False
        self._inbox: queue.SimpleQueue[Handle] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvpress-batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it steps."""
        return self._thread.is_alive() and self.error is None

    @property
    def is_busy(self) -> bool:
        """Whether somebody is served or waits."""
        own = self._stepper
        return bool(own.running or own.admission.aside or len(own.order) or self.arriving)

    def put(self, handle: Handle) -> None:
        """Hands in a request; to be called with the lock."""
        self._inbox.put(handle)
        self.arriving += 1
        self._stepper.counts.submitted += 1
        self.wake()

    def wake(self) -> None:
        """Says that something has changed."""
        with self.lock:
            self._news = True
            self.lock.notify_all()

    def rests(self, timeout: float | None) -> bool:
        """Waits until nobody is served or waits. False: somebody is, after so many seconds."""
        with self.lock:
            return self.lock.wait_for(lambda: not self.is_busy or not self.alive, timeout)

    def close(self) -> None:
        """Ends it, and everything that is served or waits."""
        self.closing = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        reason: Exception = ServingError("The batcher was closed.")
        try:
            while not self.closing:
                self._collect()
                if not self._stepper.step():
                    self._rest()
        except Exception as error:
            _LOG.exception("The batcher stopped")
            self.error, reason = error, ServingError(f"The batcher stopped: {error}")
        with self.lock:  # who hands in now is told that it has ended
            self.closing = True
            self._collect()
        self._stepper.fail_all(reason)
        self._stepper.parking.close()
        self.wake()

    def _collect(self) -> None:
        """Takes what was handed in."""
        while not self._inbox.empty():
            handle = self._inbox.get()
            self._stepper.order.add(handle)
            with self.lock:
                self.arriving -= 1

    def _rest(self) -> None:
        """Waits for news; what waits for a deadline or for room looks again after a while."""
        with self.lock:
            if not self._news:
                self.lock.notify_all()  # who waits for the last request to end
                self.lock.wait(_LOOKS if self.is_busy else None)
            self._news = False
        self._stepper.counts.last_step_at = time.monotonic()  # who rested is not stuck
