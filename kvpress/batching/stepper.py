"""One step of all requests: who comes, who goes, a part of a prompt, one token of everybody else.

One thread runs it, and nothing here is shared with others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from kvpress.batching.admission import Admission
from kvpress.batching.handle import Event, Handle
from kvpress.batching.leaving import end_waiting, leaves
from kvpress.batching.prefixes import apart
from kvpress.batching.served import Served
from kvpress.batching.stats import Counts
from kvpress.batching.text import Text
from kvpress.engine import Engine
from kvpress.errors import ServingError
from kvpress.hf.drawing import Drawer

_BYTES_EVERY = 0.1  # seconds


class Pace(NamedTuple):
    """How much is done in a step.

    chunk: tokens of a prompt that are read at once. step_tokens: no further part of a prompt is
    begun in a step that has fed so many. most_running: requests that are served at once. patience:
    seconds for which smaller requests may overtake one that finds no room.
    """

    chunk: int = 512
    step_tokens: int = 1024
    most_running: int = 64
    patience: float = 10.0


class Stepper:
    """The requests that are served, and those that wait.

    decode: texts of ids, for stop texts.
    """

    def __init__(
        self,
        engine: Engine,
        pace: Pace,
        admission: Admission,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.engine, self.pace, self.admission, self.counts = engine, pace, admission, Counts()
        self.order, self.prefixes = admission.order, admission.prefixes
        self.reserving, self.parking = admission.reserving, admission.parking
        self._decode, self._feeding = decode, engine.feeding()
        self._served = Served(admission, self.counts, self._feeding)
        self.running = self._served.running
        self._config, self._noted = engine.model.generation_config, (0, 0.0)  # texts, when

    def step(self) -> bool:
        """Does what there is to do. False: nothing is, until a request comes or goes on."""
        begun = time.perf_counter()
        self._drop_ended()
        self._admit()
        tokens = self._read() + self._advance()
        if tokens:
            self.counts.step(time.perf_counter() - begun, tokens)
        self._note_bytes()
        return tokens > 0

    def _note_bytes(self) -> None:
        """Counts what is held, for who asks from other threads: pools change while this one runs.

        It costs each text as much as a layer of a step: no more often than needed.
        """
        before, number, now = self._noted[0], len(self.running), time.perf_counter()
        if not number or number != before or now - self._noted[1] > _BYTES_EVERY:
            self.counts.bytes_held, self._noted = self.nbytes, (number, now)

    @property
    def nbytes(self) -> int:
        """Bytes that all caches hold now, those of prefixes as well."""
        return sum(text.cache.nbytes for text in self.running) + self.prefixes.nbytes

    # Who comes, who goes

    def _admit(self) -> None:
        while len(self.running) < self.pace.most_running:
            before = len(self.admission.aside)
            coming = self.admission.next(self.running)
            self._note_aside(len(self.admission.aside) - before)
            if coming is None:
                return
            if isinstance(coming, Text):
                self._served.resume(coming)
            else:
                self._start(coming)

    def _note_aside(self, more: int) -> None:
        if more > 0:
            self.counts.preempted += more
            self._feeding.forget()

    def _start(self, handle: Handle) -> None:
        """Gives a new request a cache: a copy of what its first chunks left, or an empty one."""
        self.order.take(handle)
        request = handle.request
        try:
            own = (request.sampling, self._config, len(request.ids), request.ends)
            make = partial(self.engine.make, request.max_new_tokens, handle.recipe)
            text = Text(handle, make, Drawer(*own, self._feeding.device), self._decode)
            known = self.prefixes.longest(handle.family, request.ids)
            if known is not None:
                text.begin(apart(known.cache), known.tokens)
        except Exception as error:
            self.counts.failed += 1
            handle.deliver(Event(error=error))
            return
        self.counts.cached_tokens += text.fed
        self._served.add(text)
        self.counts.tell("queue_seconds", text.usage.queue_seconds or 0.0)

    def _drop_ended(self) -> None:
        """Ends what was cancelled, or took longer than it may."""
        for handle in [x for x in self.order if leaves(x)]:
            self.order.drop(handle)
            end_waiting(handle, self.counts)
        self._served.drop_ended()

    def fail_all(self, error: Exception) -> None:
        """Ends everything that is served or waits."""
        self._served.fail_all(error)
        for handle in list(self.order):
            self.order.drop(handle)
            end_waiting(handle, self.counts, error)

    # Tokens

    def _read(self) -> int:
        """Reads parts of prompts, the first that came first. Returns the tokens that were fed."""
        fed = 0
        for text in [x for x in self.running if not x.is_read]:
            while not text.is_read and text in self.running and fed < self.pace.step_tokens:
                fed += self._read_part(text)
        return fed

    def _read_part(self, text: Text) -> int:
        ids = text.chunk(self.pace.chunk)
        try:
            logits_V = self._feeding.read(text.cache, ids, len(text.request.ids))
        except Exception as error:
            self._served.fail(text, error)
            return len(ids)
        text.fed += len(ids)
        self.counts.prompt_tokens += len(ids)
        if text.is_read:
            self._draw([text], logits_V[None], {})
        elif not text.cache.context.held:
            self.prefixes.note(text.handle.family, text.request.ids, text.fed, text.cache)
        return len(ids)

    def _advance(self) -> int:
        """One token of every text whose prompt was read. Returns how many."""
        texts = [text for text in self.running if text.decodes]
        if not texts:
            return 0
        caches, tokens = [x.cache for x in texts], [x.ids[-1] for x in texts]
        try:
            logits_BV, failed = self._feeding.decode(caches, tokens)
        except Exception as error:
            lost = ServingError(f"A decode step of {len(texts)} requests failed: {error}")
            lost.__cause__ = error
            self.counts.tell("step_errors", 1)
            for text in texts:
                self._served.fail(text, lost)
            return len(texts)
        for text in texts:
            text.fed += 1
        self._draw(texts, logits_BV, failed)
        return len(texts)

    def _draw(self, texts: list[Text], logits_BV: Tensor, failed: dict[int, Exception]) -> None:
        """Draws the next token of every text, and ends those whose last one it is.

        failed: texts whose logits mean nothing, by place, and why.
        """
        likeliest = logits_BV.max(dim=-1)  # a NaN is larger than all others
        tokens, wrong = likeliest.indices.tolist(), likeliest.values.isnan().tolist()
        for number, text in enumerate(texts):
            error = failed.get(number)
            if error is None and wrong[number]:
                error = ServingError("The model gave logits that are no numbers (NaN).")
            if error is None:
                self._draw_one(text, logits_BV[number], tokens[number])
            else:
                self._served.fail(text, error)

    def _draw_one(self, text: Text, logits_V: Tensor, likeliest: int) -> None:
        before, text.last_at = text.last_at, time.monotonic()
        try:
            reason = text.take(logits_V, likeliest)
        except Exception as error:
            self._served.fail(text, error)
            return
        self.counts.generated_tokens += 1
        if text.usage.completion_tokens > 1:
            self.counts.tell("token_seconds", text.last_at - before)
        else:
            self.counts.tell("first_token_seconds", text.usage.first_token_seconds or 0.0)
        if reason is not None:
            self._served.end(text, reason)
