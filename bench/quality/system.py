"""A system under test: a model with a cache that can be read once and asked several times."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from kvpress.bench.common.candidates import CACHES, candidate
from kvpress.bench.common.storages import storage_bytes
from kvpress.bench.quality.sample import Question
from torch import Tensor
from transformers import AttentionInterface

from kvpress.hf.attention import attention
from kvpress.hf.support import NAME
from kvpress.policy.loading import parse


class Call(NamedTuple):
    """What one layer handed to the attention function while it read a context."""

    module: Any
    states: tuple[Tensor, Tensor, Tensor]  # queries, keys, values
    options: dict[str, Any]


class System(Protocol):
    """A policy, or another implementation that is compared with them."""

    name: str

    def read(self, tokens: Sequence[int], calls: Sequence[Call] = ()) -> Any:
        """A cache of these tokens, compressed.

        calls: what the layers hand over for these tokens, where that is known already.
        """

    def ask(self, cache: Any, question: Question, stepwise: bool) -> Tensor:
        """The logits before each token of the answer, `[T, Y]`; the cache stays as it was.

        stepwise: the answer is fed token by token, as it would be decoded.
        """

    def bytes(self, cache: Any) -> tuple[int, int]:
        """Bytes held, and those that the full cache would hold; of the reference, both count."""


class LocalSystem:
    """A policy of this engine, or transformers' own cache."""

    def __init__(self, model: Any, name: str, new_tokens: int = 64) -> None:
        self.name = name
        self._candidate, self._device = candidate(model, name, new_tokens=new_tokens), model.device
        self.model = (
            self._candidate.model
        )  # a copy that shares the weights, with its engine attached
        self._attends_in_full = name not in CACHES and parse(name).sparsity is None

    def read(self, tokens: Sequence[int], calls: Sequence[Call] = ()) -> Any:
        """A cache of these tokens, compressed; an empty one of none.

        A context is attended to in full by most policies, and compressed after that: what the
        layers of one of them get is what those of another would get, but for rounding.
        """
        cache = self._candidate.new_cache()
        if calls and self._attends_in_full:
            _replay(calls, cache)
            cache.ids.note(
                cache.columns_seen, {"input_ids": self._ids(tokens)}
            )  # as a forward pass does
        elif tokens:
            self._forward(tokens, cache, 1)
        return cache

    def ask(self, cache: Any, question: Question, stepwise: bool = False) -> Tensor:
        """The logits before each token of the answer, `[T, Y]`."""
        forked = copy.deepcopy(cache) if self.name in CACHES else cache.fork()
        given = [*question.prompt, *question.answer[:-1]]
        if not stepwise:
            return self._forward(given, forked, len(question.answer))
        steps = [self._forward(question.prompt, forked, 1)]
        steps += [self._forward([token], forked, 1) for token in question.answer[:-1]]
        return torch.cat(steps)

    def generating(self, new_tokens: int) -> tuple[Any, str]:
        """An empty cache of a policy that is to decode so many tokens, and how it is passed on."""
        return self._candidate.new_cache(max_new_tokens=new_tokens), self._candidate.cache_name

    def bytes(self, cache: Any) -> tuple[int, int]:
        """Bytes held, and those that the full cache would hold."""
        return storage_bytes(cache), storage_bytes(
            cache
        ) if self.name in CACHES else cache.report().bytes_full

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._device)

    def _forward(self, tokens: Sequence[int], cache: Any, keep: int) -> Tensor:
        with torch.inference_mode():
            out = self._candidate.model(
                self._ids(tokens), logits_to_keep=keep, **{self._candidate.cache_name: cache}
            )
        kept: Tensor = out.logits[0]
        return kept


@contextlib.contextmanager
def recording(calls: list[Call]) -> Iterator[None]:
    """Notes what layers hand to the engine's attention function."""

    def noting(module: Any, *states: Any, **options: Any) -> Any:
        query, key, value, *rest = states
        calls.append(Call(module, (query, key.detach(), value), options))
        return attention(module, query, key, value, *rest, **options)

    AttentionInterface.register(NAME, noting)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention)


def _replay(calls: Sequence[Call], cache: Any) -> None:
    """Gives the layers of a cache what those of another one got."""
    with torch.inference_mode():
        for layer, (module, (query, key, value), options) in enumerate(calls):
            own_key, own_value = cache.update(key.view_as(key), value.view_as(value), layer)
            attention(module, query, own_key, own_value, None, **options)
