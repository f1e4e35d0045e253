"""A decode step of a tiered cache as a Chrome trace: who reads, copies, waits and attends when."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from kvpress.bench.common.caps import cache_bytes, resolved
from kvpress.bench.view.kept import tokenize

import kvpress
from kvpress.report import Report

SHARES = {"device": "0.25", "host": "0.35"}  # of the cache, where no caps are given
_REST = "0.75"  # on the disk then: what is left, and room
_WARM = 2  # steps before the one that is shown


class Event(NamedTuple):
    """Something that a thread did, in seconds of `perf_counter`."""

    what: str
    thread: str
    begun: float
    ended: float
    facts: dict[str, int]


@dataclass
class Recorder:
    """Keeps what it is told, by whichever thread."""

    events: list[Event] = field(default_factory=list)

    def note(self, what: str, begun: float, **facts: int) -> None:
        """Something began at `begun` and has ended now."""
        thread = threading.current_thread().name
        self.events.append(Event(what, thread, begun, perf_counter(), facts))

    def to_dict(self) -> dict[str, Any]:
        """What chrome://tracing and ui.perfetto.dev read: microseconds from the first event on."""
        start = min(event.begun for event in self.events)
        threads = list(dict.fromkeys(event.thread for event in sorted(self.events, key=_begun)))
        named = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": name}}
            for i, name in enumerate(threads)
        ]
        made = [
            {
                "name": _name(event),
                "cat": event.what,
                "ph": "X",
                "ts": 1e6 * (event.begun - start),
                "dur": 1e6 * (event.ended - event.begun),
                "pid": 1,
                "tid": threads.index(event.thread),
                "args": event.facts,
            }
            for event in sorted(self.events, key=_begun)
        ]
        return {"displayTimeUnit": "ms", "traceEvents": [*named, *made]}


def write_trace(
    model: Any, tokenizer: Any, prompt: str, policy: str, caps: Mapping[str, str | None], path: Path
) -> Report:
    """Writes a step after a prompt. caps: as they were given; without any, shares of the cache.

    Raises PromptError and the engine's errors.
    """
    ids_1T = tokenize(model, tokenizer, prompt, _WARM + 1)["input_ids"]
    recorder = Recorder()
    with tempfile.TemporaryDirectory(prefix="kvpress-") as folder:
        some = any(cap is not None for cap in caps.values())
        given = caps if some else {**SHARES, "disk": f"{_REST}:{folder}"}
        sizes = resolved(given, cache_bytes(model, ids_1T.shape[1], 1))
        with kvpress.attach(model, policy, **sizes) as engine, torch.inference_mode():
            cache, tiers = engine.new_cache(), engine.spec.tiers
            assert tiers is not None, "there are caps"
            model(ids_1T, cache=cache, logits_to_keep=1)
            for _ in range(_WARM):
                model(ids_1T[:, -1:], cache=cache)
            tiers.watch(recorder)
            begun = perf_counter()
            model(ids_1T[:, -1:], cache=cache)
            recorder.note("decode step", begun)
            tiers.watch(None)
            report = engine.report(cache)
            tiers.close()
    made = recorder.to_dict() | {"otherData": {"policy": policy, "caps": sizes}}
    path.write_text(json.dumps(made) + "\n", encoding="utf-8")
    return report


def _begun(event: Event) -> float:
    return event.begun


def _name(event: Event) -> str:
    return f"{event.what}, layer {event.facts['layer']}" if "layer" in event.facts else event.what
