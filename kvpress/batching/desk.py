"""Where requests are taken: what they ask for is checked before they wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kvpress.batching.handle import Handle
from kvpress.batching.request import Request
from kvpress.batching.reserving import Reserving
from kvpress.errors import InputError, TooLargeError
from kvpress.policy.rebudget import with_budget
from kvpress.policy.recipe import Recipe


class Most(NamedTuple):
    """The most tokens of a request: of prompt and answer together, and of the answer."""

    context: int
    new: int


class Desk:
    """Makes a handle of what is asked for, or says why not.

    It holds no weights, so that a copy can check requests in another process. recipe: the
    policies. vocabulary: how many ids the model has. share: among whose requests prefixes are
    shared: `tenant`, `all` or `none`. reads: whether there is a tokenizer for stop texts.
    """

    def __init__(
        self,
        recipe: Recipe,
        vocabulary: int,
        reserving: Reserving,
        most: Most,
        share: str,
        reads: bool,
    ) -> None:
        self.most, self._recipe, self._reserving = most, recipe, reserving
        self._share, self._reads, self._vocabulary = share, reads, vocabulary

    def ids(self, given: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
        """The ids of a prompt. Raises InputError for anything else."""
        if isinstance(given, torch.Tensor):
            if given.is_floating_point() or given.numel() != given.shape[-1]:
                raise InputError(
                    f"A prompt is one text of ids [T] or [1, T], got {list(given.shape)} of"
                    f" {given.dtype}. Submit the texts of a batch one by one."
                )
            given = given.flatten().tolist()
        if isinstance(given, str) or not len(given):
            raise InputError("A prompt is a list of at least one token id: tokenizer(text).")
        for token in given:
            if isinstance(token, bool) or not isinstance(token, int):
                raise InputError(f"{token!r} is no token id: whole numbers, as a tokenizer gives.")
            if not 0 <= token < self._vocabulary:
                raise InputError(f"{token} is no id of this model: 0 to {self._vocabulary - 1}.")
        return tuple(given)

    def handle(self, number: int, request: Request, wake: Callable[[], None]) -> Handle:
        """The handle of a request. Raises InputError, TooLargeError, BudgetError, PolicyError."""
        self._check(request)
        own = self._recipe
        if request.budget is not None:
            own = with_budget(own, request.budget)
        prompt, new = len(request.ids), request.max_new_tokens
        needed = self._reserving.bytes_of(own, prompt, new)
        self._reserving.check(needed, f"A request of {prompt:,} + {new:,} tokens")
        family = f"{request.tenant if self._share == 'tenant' else ''}\0{own}"
        return Handle(number, request, wake, own, needed, family)

    def _check(self, request: Request) -> None:
        prompt, new = len(request.ids), request.max_new_tokens
        if not _is_whole(new) or new < 1:
            raise InputError(f"max_new_tokens={new!r} must be a whole number of at least 1.")
        if request.stop and not self._reads:
            raise InputError("stop= needs a tokenizer: Batcher(model, policy, tokenizer=…).")
        if any(not isinstance(text, str) or not text for text in request.stop):
            raise InputError(f"stop={request.stop!r}: texts of at least one character.")
        timeout: Any = request.timeout
        if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
            raise InputError(f"timeout={timeout!r} must be a number of seconds above 0, or None.")
        if new > self.most.new or prompt + new > self.most.context:
            raise TooLargeError(
                f"The prompt has {prompt:,} tokens and {new:,} may be drawn; allowed are"
                f" {self.most.context:,} together, of which {self.most.new:,} drawn. Shorten the"
                " prompt or ask for fewer tokens."
            )


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
