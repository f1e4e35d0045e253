"""Asking an attention of a model for the queries that it makes of hidden states, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

_TAG = "kvpress_asked"  # the attribute of keys that nobody wants


class Answered(Exception):
    """Ends an attention's forward pass where it would attend. No error."""

    def __init__(self, query_BNQD: Tensor) -> None:
        super().__init__()
        self.query_BNQD = query_BNQD


class _Nowhere:
    """In the place of a cache: takes keys and values for nothing."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        setattr(key, _TAG, True)
        return key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


def queries_of(attention: Any, hidden_BQC: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """The queries `[B, N, Q, D]`, as they would attend; None where it attends in no known way.

    given: the other arguments of the attention, a cache among them, which is left as it is.
    """
    others = {name: _Nowhere(x) if isinstance(x, Cache) else x for name, x in given.items()}
    try:
        attention.forward(hidden_states=hidden_BQC, **others)
    except Answered as answered:
        return answered.query_BNQD
    return None


def answer(query_BNQD: Tensor, key: Tensor) -> None:
    """Ends the pass if it was begun by `queries_of`."""
    if getattr(key, _TAG, False):
        raise Answered(query_BNQD)
