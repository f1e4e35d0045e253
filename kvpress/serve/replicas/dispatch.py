"""Requests on their way: each is sent to one replica, and ends once, whatever happens there."""

from __future__ import annotations

import logging
import threading

from kvpress.batching.handle import Event
from kvpress.batching.leaving import late
from kvpress.batching.request import Completion
from kvpress.errors import RefusedError, ServingError
from kvpress.serve.replicas.member import Member, Ticket
from kvpress.serve.replicas.routing import Router
from kvpress.serve.replicas.summing import Outcomes
from kvpress.serve.replicas.wire import Lost, Told

_LOG = logging.getLogger("kvpress.serve")
MOST_MOVES = 1  # times that a request begins anew, because the replica that had it was lost
_GRACE = 5.0  # seconds after its timeout in which a replica may still say that it is over


class Dispatch:
    """Where each request is. Callers hold `lock` where it is said; nothing is handed out with it.

    members: the replicas that serve. changed: notified when a request is over.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.members: dict[int, Member] = {}
        self.tickets: dict[int, tuple[Ticket, Member]] = {}
        self.outcomes = Outcomes()
        self.router = Router()

    def place(self, ticket: Ticket) -> None:
        """Sends a request to the best replica that takes it; to be called with the lock.

        Raises RefusedError where all are full, ServingError where none serves.
        """
        loads = [
            member.load
            for member in self.members.values()
            if not member.leaving and member.number not in ticket.refused_by
        ]
        needed, number = ticket.handle.needed, ticket.handle.number
        for chosen in self.router.order(loads, ticket.starts, needed)[:1]:
            member = self.members[chosen]
            member.take(ticket)
            self.tickets[number] = (ticket, member)
            self.router.note(ticket.starts, chosen)
            return
        if not self.members:
            raise ServingError("No replica serves just now. Send the request again.")
        raise RefusedError(
            f"{sum(len(member.live) for member in self.members.values())} requests are served or"
            f" wait, as many as {len(self.members)} replicas take (most_waiting). Try again later.",
            self._retry_after(),
        )

    def _retry_after(self) -> float:
        waits = [
            member.stats.waiting_tokens / (member.stats.tokens_per_second or 1.0)
            for member in self.members.values()
            if member.stats is not None
        ]
        return min(60.0, max(1.0, min(waits, default=1.0)))

    def change(self, number: int) -> None:
        """Tells a replica that a caller has cancelled or paused a request, or lets it go on."""
        with self.lock:
            found = self.tickets.get(number)
            command = found[0].change() if found is not None else None
            if found is not None and command is not None:
                found[1].tell(command)

    def tell(self, member: Member, told: Told) -> None:
        """Hands out what a replica said of a request. Stale news are nobody's."""
        with self.lock:
            ticket = member.live.get(told.number)
        if ticket is None:
            return
        event, untouched = told.event, not ticket.handle.drawn
        if isinstance(event.error, RefusedError) and untouched:
            ticket.refused_by.add(member.number)  # it had filled up meanwhile
            self._again(ticket, member)
            return
        if told.usage is not None:
            ticket.settle(told.usage)
            if event.completion is not None:
                event = event._replace(completion=event.completion._replace(usage=told.usage))
        self._hand_out(ticket, event)

    def lose(self, member: Member, reason: BaseException) -> None:
        """Of a replica that is lost: what had no token yet begins anew, the rest ends."""
        with self.lock:
            tickets = list(member.live.values())
        moved = 0
        for ticket in tickets:
            drawn, number = len(ticket.handle.drawn), member.number
            if ticket.handle.is_cancelled or drawn or ticket.moves >= MOST_MOVES:
                said = (
                    f"Replica {number}, which served this request, was lost after {drawn} tokens."
                )
                error = Lost(f"{said} Send the request again.")
                error.__cause__ = reason
                self._hand_out(ticket, _ended(ticket, error))
            else:
                ticket.moves += 1
                moved += self._again(ticket, member)
        if tickets:
            said = "replica %s: of its %s requests %s began anew elsewhere, the others ended"
            _LOG.error(said, member.number, len(tickets), moved)

    def _again(self, ticket: Ticket, member: Member) -> bool:
        """Sends a request to another replica, of which its caller has seen nothing yet."""
        try:
            with self.lock:
                member.release(ticket)
                self.place(ticket)
                self.outcomes.moved += 1
            return True
        except ServingError as error:
            self._hand_out(ticket, _ended(ticket, error))
            return False

    def end_late(self) -> None:
        """Ends what is far behind its timeout: its replica says nothing."""
        with self.lock:
            late_ones = [one for one, _ in self.tickets.values() if one.handle.is_late]
        for ticket in late_ones:
            handle = ticket.handle
            if handle.age > (handle.request.timeout or 0.0) + _GRACE:
                handle.cancel()
                self._hand_out(ticket, Event(error=late(handle)))

    def end_all(self, error: BaseException) -> None:
        """Ends everything."""
        with self.lock:
            tickets = [one for one, _ in self.tickets.values()]
        for ticket in tickets:
            self._hand_out(ticket, Event(error=error))

    def _hand_out(self, ticket: Ticket, event: Event) -> None:
        """Gives a caller an event, and counts a request that is over."""
        handle = ticket.handle
        if event.ends:
            with self.lock:
                found = self.tickets.pop(handle.number, None)
                if found is None:
                    return  # it is over already
                found[1].release(ticket)
                self._count(event)
                self.changed.notify_all()
            if handle.usage.seconds is None:
                handle.usage.seconds = handle.age
        handle.deliver(event)

    def _count(self, event: Event) -> None:
        outcomes = self.outcomes
        if isinstance(event.error, RefusedError):
            outcomes.refused += 1
        elif event.error is not None:
            outcomes.failed += 1
        elif event.completion is not None and event.completion.reason == "cancelled":
            outcomes.cancelled += 1
        else:
            outcomes.finished += 1


def _ended(ticket: Ticket, error: BaseException) -> Event:
    """How a request ends that nobody serves: as its caller wished, or with an error."""
    handle = ticket.handle
    if not handle.is_cancelled:
        return Event(error=error)
    drawn = tuple(one.token for one in handle.drawn)
    return Event(completion=Completion(drawn, "cancelled", handle.usage))
