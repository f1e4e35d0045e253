"""Many replicas that look like one batcher: what the server asks of `contract.Batcher`."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

from kvpress.batching.handle import Handle
from kvpress.batching.request import Request, Sampling
from kvpress.batching.stats import Listener, Stats
from kvpress.errors import RefusedError, ServingError
from kvpress.serve.replicas.dispatch import Dispatch
from kvpress.serve.replicas.keeper import Keeper
from kvpress.serve.replicas.member import Member, Ticket
from kvpress.serve.replicas.routing import beginnings
from kvpress.serve.replicas.scaling import Scaling, wanted
from kvpress.serve.replicas.summing import Past, Replicas, each_of, pressure, summed
from kvpress.serve.replicas.wire import Facts, Link, News

_LOG = logging.getLogger("kvpress.serve")
_LOOKS = 0.5  # seconds between looks at what is late, and at how many replicas are wanted
_GOODBYE = 15.0  # seconds in which replicas end in order


class Fleet:
    """Serves requests on replicas; any thread may use it.

    make: the way to a new replica of a number; its model is loaded by `start`. scaling: how many
    there are, and may be. over: called once when it is closed. Raises what the first start of a
    replica raises.
    """

    def __init__(
        self,
        make: Callable[[int], Link],
        scaling: Scaling,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        self._make, self._scaling, self._over = make, scaling, over
        self._dispatch, self._past = Dispatch(), Past()
        self._numbers, self._listeners = itertools.count(), list[Listener]()
        self._drains = False
        self._closed, self._facts = threading.Event(), list[Facts]()
        self._keepers = [Keeper(number, make, self) for number in range(scaling.count)]
        self._restarts = 0  # of keepers that are gone
        try:
            for keeper in self._keepers:
                keeper.settle()
        except BaseException:
            self.close()
            raise
        facts = self._facts[0]
        self.policy, self.tokenizer = facts.policy, facts.tokenizer
        self.most_context, self.most_new = facts.desk.most
        text = SimpleNamespace(vocab_size=facts.vocabulary)
        self.model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))
        self._looking = threading.Thread(target=self._look, name="kvpress-fleet", daemon=True)
        self._looking.start()

    # What the server asks for

    def submit(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ends: Sequence[int] | None = None,
        budget: str | float | int | None = None,
        tenant: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Handle:
        """Hands in a request, as `kvpress.Batcher.submit`; it waits for no replica.

        Raises RefusedError where all replicas are full, TooLargeError, InputError, BudgetError,
        PolicyError, ServingError once it is closed, or while no replica serves.
        """
        facts, number = self._facts[0], next(self._numbers)
        request = Request(
            facts.desk.ids(ids),
            max_new_tokens,
            sampling or Sampling(),
            (stop,) if isinstance(stop, str) else tuple(stop),
            facts.ends if ends is None else tuple(ends),
            budget,
            tenant,
            priority,
            timeout,
        )
        handle = facts.desk.handle(number, request, partial(self._dispatch.change, number))
        starts = beginnings(handle.family, request.ids, facts.shared_chunk)
        with self._dispatch.lock:
            if self._closed.is_set() or self._drains:
                raise ServingError("The replicas are closing and take no more requests.")
            try:
                self._dispatch.place(Ticket(handle, starts))
            except RefusedError:
                self._dispatch.outcomes.refused += 1
                raise
            self._dispatch.outcomes.submitted += 1
        return handle

    def stats(self) -> Stats:
        """All replicas together, by what they said last."""
        with self._dispatch.lock:
            members = list(self._dispatch.members.values())
            return summed(members, self._past, self._dispatch.outcomes)

    @property
    def replicas(self) -> Replicas:
        """How many there are, how they are, and how many the work asks for."""
        with self._dispatch.lock:
            members = list(self._dispatch.members.values())
            serving = [member for member in members if not member.leaving]
            staying = [keeper for keeper in self._keepers if not keeper.leaving]
            restarts = self._restarts + sum(keeper.restarts for keeper in self._keepers)
            return Replicas(
                alive=len(members),
                starting=max(len(staying) - len(serving), 0),
                wanted=wanted(pressure(self.stats(), len(serving))),
                restarts=restarts,
                moved=self._dispatch.outcomes.moved,
                each=each_of(members),
            )

    def observe(self, listener: Listener) -> None:
        """Calls a function with figures of all replicas, in their threads."""
        self._listeners.append(listener)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits until all are over. False: some are not in time."""
        dispatch = self._dispatch
        with dispatch.lock:
            self._drains = True
            return dispatch.changed.wait_for(lambda: not dispatch.tickets, timeout)

    def close(self) -> None:
        """Ends all replicas, and what they still serve. Calling it twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._dispatch.lock:
            keepers = list(self._keepers)
            for keeper in keepers:
                keeper.end()
        self._dispatch.end_all(ServingError("The batcher was closed."))
        until = time.monotonic() + _GOODBYE
        for keeper in keepers:
            keeper.join(max(until - time.monotonic(), 0.0))
        self._over()

    # What keepers say

    def joined(self, member: Member) -> None:
        """A replica serves."""
        with self._dispatch.lock:
            self._facts.append(member.facts)
            del self._facts[1:]
            self._dispatch.members[member.number] = member
        _LOG.info("replica %s serves on %s", member.number, member.facts.node)

    def heard(self, member: Member, news: News) -> None:
        """Hands out what a replica said."""
        with self._dispatch.lock:
            member.note(news)
        for told in news.told:
            # What a batcher says that has stopped is about itself: the request may go elsewhere.
            if news.stats.alive or type(told.event.error) is not ServingError:
                self._dispatch.tell(member, told)
        for listener in list(self._listeners):
            try:
                for name, value in news.figures:
                    listener(name, value)
            except Exception:  # requests must not end because a figure was not wanted
                _LOG.exception("A listener of the replicas failed")
                self._listeners.remove(listener)

    def lost(self, member: Member, reason: BaseException) -> None:
        """Moves or ends what a replica had that is lost."""
        self._forget(member)
        self._dispatch.lose(member, reason)

    def left(self, member: Member) -> None:
        """A replica has ended in order."""
        self._forget(member)

    def _forget(self, member: Member) -> None:
        with self._dispatch.lock:
            self._dispatch.members.pop(member.number, None)
            self._dispatch.router.forget(member.number)
            self._past.add(member.stats)

    # How many there are

    def _look(self) -> None:
        while not self._closed.wait(_LOOKS):
            try:
                self._dispatch.end_late()
                self._scale(time.monotonic())
            except Exception:  # the next look must come
                _LOG.exception("Looking after replicas failed")

    def _scale(self, now: float) -> None:
        """Starts a replica, or lets one go."""
        stats, dispatch = self.stats(), self._dispatch
        with dispatch.lock:
            for keeper in [keeper for keeper in self._keepers if keeper.ended]:
                self._restarts += keeper.restarts
                self._keepers.remove(keeper)
            staying = [keeper for keeper in self._keepers if not keeper.leaving]
            serving = [keeper for keeper in staying if keeper.member is not None]
            count = self._scaling.step(pressure(stats, len(serving)), now)
            if len(staying) < count and not self._closed.is_set():
                used = {keeper.number for keeper in self._keepers}
                number = next(x for x in itertools.count() if x not in used)
                _LOG.info("replica %s is started: the work asks for it", number)
                self._keepers.append(Keeper(number, self._make, self, patient=True))
            elif len(staying) > count:
                idle = min(staying, key=lambda one: _busy(one.member))
                _LOG.info("replica %s ends: the work does not need it", idle.number)
                idle.leave()


def _busy(member: Member | None) -> tuple[int, int]:
    return (-1, 0) if member is None else (len(member.live), -member.number)
