"""`kvpress.Batcher`: many requests on one model, which any thread submits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from kvpress.batching.handle import Handle
from kvpress.batching.loop import Loop
from kvpress.batching.making import make
from kvpress.batching.moment import moment
from kvpress.batching.request import Request, Sampling
from kvpress.batching.stats import Listener, Stats
from kvpress.batching.stepper import Pace
from kvpress.engine import attach
from kvpress.errors import InputError, RefusedError, ServingError
from kvpress.hf.drawing import ends_of
from kvpress.policy.base import Policy
from kvpress.policy.recipe import Recipe
from kvpress.store.tiers.caps import Caps


class Batcher:
    """Serves many requests on one model at once; a context manager.

    The model is the batcher's until it is closed: nobody else may call it meanwhile.

    policy: as `attach` takes it. device: the most bytes that keys and values of all requests take,
    `"8GiB"`; None: no cap. host, disk: where requests of lower priority wait that make room for
    others, `"16GiB"`, `"20GiB:folder"`; None: they are never interrupted. chunk: tokens of a prompt
    that are read at once. step_tokens: of a step, behind which no further part of a prompt is
    begun. most_running, most_waiting: requests. most_context, most_new: tokens of a request; None:
    what the model takes. share_prefixes: among requests of one `"tenant"`, of `"all"`, or `"none"`.
    patience: seconds for which smaller requests overtake one that finds no room. tokenizer: for
    stop texts. desk: checks requests. options: those of `attach`. Raises what `attach` raises,
    UnsupportedModelError for a generation config that is not honoured.
    """

    def __init__(
        self,
        model: Any,
        policy: str | Policy | Recipe | Sequence[str | Policy],
        *,
        tokenizer: Any = None,
        device: str | int | None = None,
        host: str | int | None = None,
        disk: str | None = None,
        chunk: int = 512,
        step_tokens: int = 1024,
        most_running: int = 64,
        most_waiting: int = 1024,
        most_context: int | None = None,
        most_new: int | None = None,
        share_prefixes: str = "tenant",
        patience: float = 10.0,
        **options: Any,
    ) -> None:
        if not isinstance(most_waiting, int) or most_waiting < 1:
            raise InputError(f"most_waiting={most_waiting!r} must be a whole number of at least 1.")
        pace = Pace(chunk, step_tokens, most_running, patience)
        caps = Caps.parse(device, host, disk)
        self.engine = attach(model, policy, tokenizer=tokenizer, **options)
        try:
            limits = (most_context, most_new)
            made = make(self.engine, pace, caps, share_prefixes, tokenizer, *limits)
        except BaseException:
            self.engine.detach()
            raise
        self.desk, self._stepper, self.most_waiting = made.desk, made.stepper, most_waiting
        self.most_context, self.most_new = made.desk.most
        self._numbers, self._drains = itertools.count(), False
        self._loop = Loop(made.stepper)

    @property
    def model(self) -> Any:
        """The model that serves."""
        return self.engine.model

    @property
    def policy(self) -> str:
        """The policy, written out."""
        return str(self.engine.recipe)

    @property
    def shared_chunk(self) -> int:
        """Tokens of the parts in which prompts that begin alike are shared; 0: they are not."""
        return self._stepper.prefixes.shared_chunk

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Requests

    def submit(
        self,
        ids: Sequence[int] | torch.Tensor,
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
        """Hands in a request; it never waits.

        ids: of the prompt, `[T]` or `[1, T]`. stop: texts that end it. ends: ids that do; None:
        those of the model. budget: instead of the policy's. tenant: whose it is. priority: larger
        goes first. timeout: seconds. Raises RefusedError where too many wait, TooLargeError for
        what could never be served, InputError, BudgetError, PolicyError, ServingError once closed.
        """
        known = ends_of(self.model.generation_config) if ends is None else tuple(ends)
        request = Request(
            self.desk.ids(ids),
            max_new_tokens,
            sampling or Sampling(),
            (stop,) if isinstance(stop, str) else tuple(stop),
            known,
            budget,
            tenant,
            priority,
            timeout,
        )
        handle = self.desk.handle(next(self._numbers), request, self._loop.wake)
        with self._loop.lock:
            self._check_open()
            self._loop.put(handle)
        return handle

    def _check_open(self) -> None:
        """Raises ServingError, RefusedError where nobody is taken."""
        if self._loop.error is not None:
            raise ServingError("The batcher has stopped after an error.") from self._loop.error
        if self._loop.closing or self._drains:
            raise ServingError("The batcher is closing and takes no more requests.")
        waiting = self._loop.arriving + len(self._stepper.order)
        if waiting >= self.most_waiting:
            self._stepper.counts.refused += 1
            raise RefusedError(
                f"{waiting} requests wait already, as many as may (most_waiting). Try again later.",
                self._retry_after(),
            )

    def _retry_after(self) -> float:
        rate = self._stepper.counts.tokens_per_second or 1.0
        return min(60.0, max(1.0, self._stepper.order.tokens / rate))

    # How it is

    def observe(self, listener: Listener) -> None:
        """Calls a function with figures as they are measured, in the thread of the model."""
        self._stepper.counts.listeners.append(listener)

    def stats(self) -> Stats:
        """How it is now."""
        return moment(self._stepper, self._loop)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits until all are over. False: some are not after `timeout`.

        timeout: seconds; None: as long as it takes.
        """
        self._drains = True
        return self._loop.rests(timeout)

    def close(self) -> None:
        """Ends what is still served, and detaches the engine. Calling it twice is harmless."""
        self._loop.close()
        self.engine.detach()
