"""What the server asks of a batcher, so that it can be read and tested without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvpress.batching.handle import Handle
from kvpress.batching.request import Sampling


class Stats(Protocol):
    """The numbers of a batcher that the server tells others. Bytes are of keys and values."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def preempted(self) -> int: ...
    @property
    def finished(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def bytes_held(self) -> int: ...
    @property
    def bytes_capacity(self) -> int | None: ...
    @property
    def bytes_full(self) -> int: ...
    @property
    def bytes_prefixes(self) -> int: ...
    @property
    def bytes_host(self) -> int: ...
    @property
    def bytes_disk(self) -> int: ...
    @property
    def last_step_at(self) -> float: ...
    @property
    def alive(self) -> bool: ...


class Batcher(Protocol):
    """Serves requests side by side. None of its calls waits for the model, except `drain`."""

    @property
    def policy(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def most_context(self) -> int: ...
    @property
    def most_new(self) -> int: ...

    def submit(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = ...,
        stop: Sequence[str] = ...,
        ends: Sequence[int] | None = ...,
        budget: str | float | int | None = ...,
        tenant: str = ...,
        priority: int = ...,
        timeout: float | None = ...,
    ) -> Handle:
        """Takes a request. Raises RefusedError, TooLargeError, BudgetError, ServingError."""

    def stats(self) -> Stats: ...

    def observe(self, listener: Callable[[str, float], None]) -> None:
        """Calls a function with the name of a measurement and its value, in any thread."""

    def drain(self, timeout: float | None = None) -> bool:
        """Takes nothing more, waits for what runs; False where that took too long."""

    def close(self) -> None:
        """Ends everything."""
