"""A batcher without a model: a thread that hands out scripted tokens through real handles."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from kvpress.batching.handle import Event, Handle
from kvpress.batching.request import Completion, Drawn, Request, Sampling
from kvpress.errors import RefusedError, ServingError, TooLargeError
from kvpress.policy.budget import Budget

WORDS = "Grüße, 世界! 🙂 One, two, three STOP four. "


class Numbers(NamedTuple):
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    bytes_held: int = 0
    bytes_capacity: int | None = None
    bytes_full: int = 0
    bytes_prefixes: int = 0
    bytes_host: int = 0
    bytes_disk: int = 0
    last_step_at: float = 0.0
    alive: bool = True


class Batcher:
    """Draws a token of every request in each step.

    tokenizer: reads the script, a text that depends on the request. pace: seconds of a step.
    most_waiting: requests beside which no other is taken.
    """

    policy = "some:budget=0.5"
    most_context = 4096

    def __init__(
        self,
        tokenizer: Any,
        script: Callable[[Request], str] = lambda request: WORDS,
        *,
        pace: float = 0.0005,
        most_waiting: int = 1000,
        most_new: int = 2048,
        stops: bool = True,
    ) -> None:
        self.model = SimpleNamespace(
            config=SimpleNamespace(
                get_text_config=lambda decoder: SimpleNamespace(vocab_size=len(tokenizer))
            )
        )
        self.most_new, self.most_waiting, self.pace = most_new, most_waiting, pace
        self.requests: list[Request] = []
        self.handles: dict[int, Handle] = {}
        self._tokenizer, self._script, self._stops = tokenizer, script, stops
        self._texts: dict[int, list[int]] = {}
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closed = self._dead = False
        self._numbers = Numbers(last_step_at=time.monotonic())
        self._listeners: list[Callable[[str, float], None]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008
        stop: Sequence[str] = (),
        ends: Sequence[int] | None = None,
        budget: str | float | int | None = None,
        tenant: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Handle:
        own = (self._tokenizer.eos_token_id,) if ends is None else tuple(ends)
        if budget is not None:
            Budget.parse(budget)
        with self._lock:
            if self._closed or self._dead:
                raise ServingError("The batcher is closed.")
            if len(self.handles) >= self.most_waiting:
                self._count(refused=1)
                raise RefusedError("Too many requests wait.", retry_after=6.2)
            if len(ids) + max_new_tokens > self.most_context:
                raise TooLargeError("Too long.")
            request = Request(
                tuple(ids), max_new_tokens, sampling, tuple(stop), own, budget, tenant, 0, timeout
            )
            handle = Handle(len(self.requests), request, self._wake.set)
            self.requests.append(request)
            script = self._tokenizer(self._script(request))["input_ids"]
            self._texts[handle.number] = [*script, self._tokenizer.eos_token_id]
            self.handles[handle.number] = handle
            self._count(submitted=1, prompt_tokens=len(ids))
        self._wake.set()
        return handle

    def stats(self) -> Numbers:
        held = sum(handle.usage.bytes_held for handle in list(self.handles.values()))
        return self._numbers._replace(
            running=len(self.handles),
            bytes_held=held,
            alive=not self._dead and not self._closed,
        )

    def observe(self, listener: Callable[[str, float], None]) -> None:
        self._listeners.append(listener)

    def drain(self, timeout: float | None = None) -> bool:
        until = time.monotonic() + (timeout or 0)
        while self.handles and time.monotonic() < until:
            time.sleep(0.01)
        return not self.handles

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()

    def die(self) -> None:
        """As if the thread had gone without a word to anybody."""
        self._dead = True
        self._wake.set()

    def fail(self, error: BaseException) -> None:
        """Ends all that runs with an error; the thread goes on."""
        for handle in list(self.handles.values()):
            self._end(handle, Event(error=error))

    def _run(self) -> None:
        while not self._closed and not self._dead:
            if not self.handles:
                self._wake.wait(0.05)
                self._wake.clear()
            began = time.monotonic()
            for handle in list(self.handles.values()):
                self._step(handle)
            self._numbers = self._numbers._replace(last_step_at=time.monotonic())
            for listener in self._listeners:
                listener("step_seconds", time.monotonic() - began)
            time.sleep(self.pace)

    def _step(self, handle: Handle) -> None:
        request, usage = handle.request, handle.usage
        if handle.is_cancelled:
            self._end(handle, Event(completion=self._completion(handle, "cancelled")))
            return
        if handle.is_paused:
            return
        script = self._texts[handle.number]
        token = script[usage.completion_tokens % len(script)]
        logprob = None if request.sampling.logprobs is None else -0.5
        top = tuple((token, -0.5) for _ in range(request.sampling.logprobs or 0))
        usage.completion_tokens += 1
        usage.slots_kept, usage.slots_full, usage.bytes_held = 50, 100, 1000
        usage.cached_tokens = 3
        with self._lock:
            self._count(generated_tokens=1)
        handle.deliver(Event((Drawn(token, logprob, top),)))
        text = self._tokenizer.decode([one.token for one in handle.drawn]) if request.stop else ""
        if token in request.ends or (self._stops and any(stop in text for stop in request.stop)):
            self._end(handle, Event(completion=self._completion(handle, "stop")))
        elif usage.completion_tokens >= request.max_new_tokens:
            self._end(handle, Event(completion=self._completion(handle, "length")))

    def _completion(self, handle: Handle, reason: str) -> Completion:
        return Completion(tuple(one.token for one in handle.drawn), reason, handle.usage)

    def _end(self, handle: Handle, event: Event) -> None:
        with self._lock:
            self.handles.pop(handle.number, None)
            reason = event.completion.reason if event.completion else "failed"
            self._count(**{reason if reason in ("cancelled", "failed") else "finished": 1})
        handle.deliver(event)

    def _count(self, **more: int) -> None:
        counted = {name: getattr(self._numbers, name) + number for name, number in more.items()}
        self._numbers = self._numbers._replace(**counted)
