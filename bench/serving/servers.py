"""Who serves: the engine one by one, the engine's batcher. Each on a copy with the same weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from kvpress.bench.serving.heard import Heard, Round
from kvpress.bench.serving.workload import Asked
from transformers import GenerationConfig

import kvpress
from kvpress.batching.batcher import Batcher
from kvpress.batching.handle import Event

_LIMIT = 3600.0  # seconds after which a request counts as lost
_EVERY = 0.1  # seconds between two looks at what is held, which take time from the steps


class Server(Protocol):
    """Serves requests that arrive by a schedule."""

    def serve(self, asked: Sequence[Asked]) -> Round:
        """All of them, to the last token."""

    def close(self) -> None:
        """Ends its threads."""


def copied(model: Any) -> Any:
    """A model that shares the weights, and draws the likeliest token without an end."""
    made = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    made.generation_config = greedy()
    return made


def greedy(**more: Any) -> Any:
    """The config of the likeliest token, again and again."""
    config: Any = GenerationConfig  # its constructor has no types
    return config(do_sample=False, pad_token_id=0, **more)


def wait_until(moment: float) -> None:
    """Sleeps until then, by `time.perf_counter`."""
    time.sleep(max(0.0, moment - time.perf_counter()))


class OneByOne:
    """`engine.generate` for each request in order of arrival. chunk: as the batcher reads prompts.

    Policies evict at the end of a chunk: with other chunks they would draw other tokens.
    """

    def __init__(self, model: Any, policy: str, chunk: int) -> None:
        self._engine = kvpress.attach(copied(model), policy)
        self._chunk = chunk

    def serve(self, asked: Sequence[Asked]) -> Round:
        """See `Server`."""
        start, heard, held = time.perf_counter(), [], 0
        for one in asked:
            own = Heard(start + one.at)
            wait_until(own.arrived)
            own.begun = time.perf_counter()
            self._generate(one, own)
            held = max(held, self._engine.report().bytes_held)
            heard.append(own)
        return Round(heard, held)

    def _generate(self, one: Asked, own: Heard) -> None:
        ids = torch.tensor([one.ids], device=self._engine.model.device)
        parts: dict[str, Any] = {}
        if len(one.ids) > self._chunk:
            parts["prefill_chunk_size"] = self._chunk
        self._engine.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=one.new_tokens,
            streamer=_Streamer(own, len(one.ids)),
            **parts,
        )

    def close(self) -> None:
        """See `Server`."""
        self._engine.detach()


class _Streamer:
    """What `generate` hands its tokens to, the prompt first."""

    def __init__(self, own: Heard, prompt: int) -> None:
        self._own, self._skipped = own, prompt

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        new = ids[self._skipped :]
        self._skipped = max(0, self._skipped - len(ids))
        self._own.tokens += new
        self._own.times += [time.perf_counter()] * len(new)

    def end(self) -> None:
        """Nothing is left to hand on."""


class Batched:
    """`kvpress.Batcher`, which lives through all rounds. cap: of bytes; None: there is none.

    Prefixes are not shared: the prompts of a round are those of the round before.
    """

    def __init__(
        self, model: Any, policy: str, chunk: int, running: int, cap: str | None = None
    ) -> None:
        with torch.inference_mode(False):  # its thread is not in that mode
            self._batcher = Batcher(
                copied(model),
                policy,
                device=cap,
                chunk=chunk,
                most_running=running,
                most_waiting=2**20,
                share_prefixes="none",
            )
        self._every = _EVERY if cap is None else 0.0  # a cap is looked at after every step
        self._held, self._looked = 0, 0.0
        self._batcher.observe(self._look)

    def serve(self, asked: Sequence[Asked]) -> Round:
        """See `Server`."""
        self._held, start = 0, time.perf_counter()
        served = []
        for one in asked:
            own = Heard(start + one.at)
            wait_until(own.arrived)
            own.begun = time.perf_counter()
            handle = self._batcher.submit(one.ids, max_new_tokens=one.new_tokens, ends=())
            handle.listen(partial(_hear, own))
            served.append((own, handle))
        for own, handle in served:
            own.begun += handle.result(_LIMIT).usage.queue_seconds or 0.0
        return Round([own for own, _ in served], self._held)

    def _look(self, name: str, value: float) -> None:
        """Listens to the batcher, in its thread."""
        now = time.monotonic()
        if now - self._looked >= self._every:
            self._held = max(self._held, self._batcher.stats().bytes_held)
            self._looked = time.monotonic()

    def close(self) -> None:
        """See `Server`."""
        self._batcher.close()


def _hear(own: Heard, event: Event) -> None:
    own.tokens += [drawn.token for drawn in event.drawn]
    own.times += [time.perf_counter()] * len(event.drawn)
