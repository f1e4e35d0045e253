"""A system under test: a model with a cache that can be read once and asked several times."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from kvpress.bench.common.candidates import CACHES, candidate
from kvpress.bench.common.reads import StepReads, sum_of
from kvpress.bench.common.storages import storage_bytes
from kvpress.bench.quality.sample import Question
from torch import Tensor
from transformers import AttentionInterface

from kvpress.hf.attention import attention
from kvpress.hf.support import NAME
from kvpress.policy.loading import parse
from kvpress.policy.recipe import Recipe
from kvpress.report import Report


class Call(NamedTuple):
    """What one layer handed to the attention function while it read a context."""

    module: Any
    states: tuple[Tensor, Tensor, Tensor]  # queries, keys, values
    options: dict[str, Any]


Spans = Sequence[tuple[int, int]]  # of tokens: the first, and the one behind the last


class Held(NamedTuple):
    """Bytes that a cache holds; of the full cache; of the full cache in bfloat16 (0: unknown)."""

    held: int
    full: int
    bf16: int = 0


class System(Protocol):
    """A policy, or another implementation that is compared with them."""

    name: str

    def read(self, tokens: Sequence[int], calls: Sequence[Call] = (), protect: Spans = ()) -> Any:
        """A cache of these tokens, compressed.

        calls: what the layers hand over for these tokens, where that is known already. protect:
        what a caller would protect, for systems that were told to.
        """

    def ask(self, cache: Any, question: Question, stepwise: bool) -> Tensor:
        """The logits before each token of the answer, `[T, Y]`; the cache stays as it was.

        stepwise: the answer is fed token by token, as it would be decoded. Systems that read some
        pages only are always fed so, the question too: a pass of several tokens reads everything.
        """

    def decode(self, cache: Any, prompt: Sequence[int], most: int) -> list[int]:
        """Greedy tokens after a prompt, up to an end of text; the cache stays as it was."""

    def bytes(self, cache: Any) -> Held:
        """What the cache holds; of the reference, what the full cache would hold counts too."""

    def step_reads(self, cache: Any) -> StepReads | None:
        """What the steps of questions read that were asked of the cache; None: everything."""


class LocalSystem:
    """A policy of this engine, or transformers' own cache."""

    def __init__(
        self,
        model: Any,
        policy: str | Recipe,
        new_tokens: int = 64,
        cache_dtype: torch.dtype | None = None,
        protects: bool = False,
    ) -> None:
        self.name, known = str(policy), policy in CACHES
        self._protects = protects and not known  # those evict nothing
        self._candidate = candidate(model, policy, cache_dtype, new_tokens)
        # a copy that shares the weights, with its engine attached
        self.model, self._device = self._candidate.model, model.device
        self._replays = not known and _attends_once_in_full(parse(policy))
        self._retrieves = not known and parse(policy).retrieves
        self._asked: weakref.WeakKeyDictionary[Any, list[Report]] = weakref.WeakKeyDictionary()
        self._ends = _ends(model)

    def read(self, tokens: Sequence[int], calls: Sequence[Call] = (), protect: Spans = ()) -> Any:
        """A cache of these tokens, compressed; an empty one of none.

        A context is attended to in full by most policies, and compressed after that: what the
        layers of one of them get is what those of another would get, but for rounding.
        """
        given = {"protect": list(protect)} if protect and self._protects else {}
        cache = self._candidate.new_cache(**given)
        if calls and self._replays:
            _replay(calls, cache)
            cache.ids.note(
                cache.columns_seen, {"input_ids": self._ids(tokens)}
            )  # as a forward pass does
        elif tokens:
            self._forward(tokens, cache, 1)
        return cache

    def ask(self, cache: Any, question: Question, stepwise: bool = False) -> Tensor:
        """The logits before each token of the answer, `[T, Y]`."""
        forked = self._fork(cache)
        given = [*question.prompt, *question.answer[:-1]]
        if not (stepwise or self._retrieves):
            return self._forward(given, forked, len(question.answer))
        steps = [self._prompted(question.prompt, forked)]
        steps += [self._forward([token], forked, 1) for token in question.answer[:-1]]
        if self._retrieves:
            self._asked.setdefault(cache, []).append(forked.report())
        return torch.cat(steps)

    def decode(self, cache: Any, prompt: Sequence[int], most: int) -> list[int]:
        """Greedy tokens after a prompt, without the end of text that they may stop at."""
        forked, given, made = self._fork(cache), list(prompt), list[int]()
        while len(made) < most:
            token = int(self._prompted(given, forked)[-1].argmax())
            if token in self._ends:
                break
            made.append(token)
            given = [token]
        return made

    def generating(self, new_tokens: int) -> tuple[Any, str]:
        """An empty cache of a policy that is to decode so many tokens, and how it is passed on."""
        return self._candidate.new_cache(max_new_tokens=new_tokens), self._candidate.cache_name

    def bytes(self, cache: Any) -> Held:
        """What the cache holds, and what the full one would hold."""
        held = storage_bytes(cache)
        full = held if self.name in CACHES else cache.report().bytes_full
        return Held(held, full, full * 2 // self.model.dtype.itemsize)

    def step_reads(self, cache: Any) -> StepReads | None:
        """What the steps of questions read that were asked of the cache; None: everything."""
        asked = self._asked.get(cache) if self._retrieves else None
        return sum_of(cache.report(), asked) if asked else None

    def _prompted(self, prompt: Sequence[int], cache: Any) -> Tensor:
        """The logits behind a question `[1, Y]`, of which each token is a step of its own.

        In one pass where that reads what steps would read.
        """
        if not self._retrieves:
            return self._forward(prompt, cache, 1)
        return [self._forward([token], cache, 1) for token in prompt][-1]

    def _fork(self, cache: Any) -> Any:
        return copy.deepcopy(cache) if self.name in CACHES else cache.fork()

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._device)

    def _forward(self, tokens: Sequence[int], cache: Any, keep: int) -> Tensor:
        with torch.inference_mode():
            out = self._candidate.model(
                self._ids(tokens), logits_to_keep=keep, **{self._candidate.cache_name: cache}
            )
        kept: Tensor = out.logits[0]
        return kept


def _attends_once_in_full(recipe: Recipe) -> bool:
    """Whether a context is attended to in full, and looked at once.

    A second pass runs the model again, which no record of another policy's layers can stand for.
    """
    return recipe.sparsity is None and not recipe.looks


def _ends(model: Any) -> frozenset[int]:
    """The tokens that end a text."""
    given = model.generation_config.eos_token_id
    return frozenset([given] if isinstance(given, int) else given or ())


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
