"""One place for a replica: it is started, listened to, and started again when it is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvpress.serve.replicas.member import Member
from kvpress.serve.replicas.wire import Link, News

SILENT = 30.0  # seconds without a word after which a replica is given up
_SOUND = 60.0  # seconds after which one that was lost is not taken for one that cannot start
_LONGEST_PAUSE = 30.0  # seconds between attempts to start it
_LOG = logging.getLogger("kvpress.serve")


class Front(Protocol):
    """Who hears of replicas; every call comes from the thread of that replica's keeper."""

    def joined(self, member: Member) -> None:
        """It serves."""

    def heard(self, member: Member, news: News) -> None:
        """It said something."""

    def lost(self, member: Member, reason: BaseException) -> None:
        """It will say nothing any more; its requests are still counted among its own."""

    def left(self, member: Member) -> None:
        """It has served all that it had, and ends."""


class Keeper:
    """Keeps one replica alive, in a thread of its own, so that its news are never out of order.

    make: the way to a new one. patient: whether one that could never be started is tried again.
    member: the one that serves now. error: why it could not be started. restarts: after it was
    lost.
    """

    def __init__(
        self, number: int, make: Callable[[int], Link], front: Front, patient: bool = False
    ) -> None:
        self.number, self._make, self._front, self._patient = number, make, front, patient
        self.member: Member | None = None
        self.error: BaseException | None = None
        self.restarts = 0
        self.leaving = False
        self._settled, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kvpress-replica-{number}")
        self._thread.daemon = True
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it keeps nothing any more."""
        return not self._thread.is_alive()

    def settle(self) -> None:
        """Waits until the first replica serves. Raises why it does not."""
        self._settled.wait()
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """Lets the replica end once it has served what it has."""
        self.leaving = True
        if self.member is not None:
            self.member.leaving = True
            self.member.tell()  # so that it speaks now
        else:
            self._ending.set()

    def end(self) -> None:
        """Ends the replica soon; `join` waits for that."""
        self._ending.set()
        member = self.member
        if member is not None:
            member.tell()

    def join(self, timeout: float) -> None:
        """Waits for its end, for so many seconds at most."""
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = 1.0
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                self._keep()
                break
            except Exception as error:
                if not self._settled.is_set() and not self._patient:
                    self.error = error
                    break
                if self._ending.is_set() or self.leaving:
                    break
                _LOG.error("replica %s: %s", self.number, error)
            pause = 1.0 if time.monotonic() - began > _SOUND else min(2 * pause, _LONGEST_PAUSE)
            self._ending.wait(pause)
            self.restarts += 1
        self._settled.set()

    def _keep(self) -> None:
        """From its start to its end. Raises why it could not be started, or is lost."""
        link = self._make(self.number)
        try:
            facts = link.start(self._ending.is_set)
            member = Member(self.number, link, facts)
            self._listen(member)
        except BaseException:
            link.kill()
            raise
        link.close()

    def _listen(self, member: Member) -> None:
        self.member = member
        self._front.joined(member)
        self._settled.set()
        try:
            while not self._ending.is_set() and (member.live or not self.leaving):
                news = member.link.hear(SILENT)
                self._front.heard(member, news)
                member.check(news)
        except Exception as error:
            self.member = None
            self._front.lost(member, error)
            raise
        self.member = None
        self._front.left(member)
