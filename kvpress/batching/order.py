"""Whose turn it is: requests that wait, by tenant, priority and arrival."""

from __future__ import annotations

from collections.abc import Iterator

from kvpress.batching.handle import Handle


class Order:
    """Requests that wait.

    The tenant that was given the fewest tokens so far comes first (start-time fair queueing): one
    that floods the queue delays itself alone. Of a tenant's own, larger priorities go first, and of
    these who came first.

    tokens: that all of them may come to, prompts included.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[Handle]] = {}
        self._given: dict[str, float] = {}  # tokens, by tenant
        self._count = self.tokens = 0  # which other threads may ask for

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Handle]:
        """All of them, next first: those of the next tenant, then of the one behind it."""
        for tenant in self._tenants():
            yield from self._waiting[tenant]

    def add(self, handle: Handle) -> None:
        """Puts a request behind those that go before it."""
        tenant = handle.request.tenant
        if tenant not in self._waiting:
            # Who was away has not saved up turns: it begins where the others are.
            others = [self._given[name] for name in self._waiting]
            self._given[tenant] = max(self._given.get(tenant, 0.0), min(others, default=0.0))
        queue = self._waiting.setdefault(tenant, [])
        queue.append(handle)
        self._count, self.tokens = self._count + 1, self.tokens + _tokens(handle)
        queue.sort(key=lambda one: (-one.request.priority, one.number))

    def heads(self) -> list[Handle]:
        """The first request of every tenant, in turn."""
        return [self._waiting[tenant][0] for tenant in self._tenants()]

    def take(self, handle: Handle) -> None:
        """Takes a request out, whose turn is used up."""
        self.drop(handle)
        self._given[handle.request.tenant] += _tokens(handle)

    def drop(self, handle: Handle) -> None:
        """Takes a request out that will not be served."""
        queue = self._waiting[handle.request.tenant]
        queue.remove(handle)
        self._count, self.tokens = self._count - 1, self.tokens - _tokens(handle)
        if not queue:
            del self._waiting[handle.request.tenant]

    def _tenants(self) -> list[str]:
        return sorted(self._waiting, key=lambda name: (self._given[name], name))


def _tokens(handle: Handle) -> int:
    return len(handle.request.ids) + handle.request.max_new_tokens
