"""Requests that end before they are served: their callers left, or their time is over."""

from __future__ import annotations

from kvpress.batching.handle import Event, Handle
from kvpress.batching.request import Completion
from kvpress.batching.stats import Counts
from kvpress.errors import DeadlineError


def leaves(handle: Handle) -> bool:
    """Whether a request is to end now."""
    return handle.is_cancelled or handle.is_late


def late(handle: Handle) -> DeadlineError:
    """The error of a request that took longer than it may."""
    return DeadlineError(
        f"The request was not over after {handle.request.timeout:g} seconds, its timeout. Ask for"
        " fewer tokens, or give it more time."
    )


def end_waiting(handle: Handle, counts: Counts, error: Exception | None = None) -> None:
    """Tells the caller of a request that waited. error: why it ends; None: as it asked for."""
    handle.usage.seconds = handle.age
    if error is None and handle.is_cancelled:
        counts.cancelled += 1
        handle.deliver(Event(completion=Completion((), "cancelled", handle.usage)))
        return
    counts.failed += 1
    handle.deliver(Event(error=late(handle) if error is None else error))
