"""One by one, batched and transformers' batching in turn, on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from kvpress.bench.common.candidates import FULL, warm_up
from kvpress.bench.common.journal import Row
from kvpress.bench.common.models import Source
from kvpress.bench.common.text import default_text
from kvpress.bench.common.timing import Samples
from kvpress.bench.serving.heard import Round, most_at_once, spread
from kvpress.bench.serving.servers import Batched, OneByOne, Server
from kvpress.bench.serving.theirs import PAGE, Theirs
from kvpress.bench.serving.workload import Asked, Load, text_ids
from kvpress.bench.speed.rounds import run_rounds

THEIRS = "transformers' batching"
ALONE, BATCHED = "one by one, ", "batched, "  # and a policy
_WARM = 2  # requests that are served before the first round


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run has in common. running: requests at once. batch_tokens: of transformers' passes.

    chunk: tokens of a prompt that are read at once. caps: of bytes, a second part of the run.
    """

    source: Source
    policies: tuple[str, ...]
    load: Load
    rounds: int
    warmup: int
    chunk: int
    running: int
    batch_tokens: int
    theirs: bool
    caps: tuple[str, ...]
    threads: int
    text: dict[str, str] = field(default_factory=lambda: default_text().to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        apart = ("source", "load", "policies", "caps")
        plain = {k: v for k, v in asdict(self).items() if k not in apart}
        load = {k: "-".join(map(str, v)) if isinstance(v, tuple) else v for k, v in self._load}
        own = {"model": self.source.name, "dtype": self.source.dtype_name, **load}
        own |= {"policy": " and ".join(self.policies), "cap": " and ".join(self.caps) or None}
        return {**own, **self.source.load_options, **plain, "page_size": PAGE}

    @property
    def _load(self) -> list[tuple[str, Any]]:
        return list(asdict(self.load).items())


class _Measured:
    """A server through the rounds."""

    def __init__(self, server: Server, asked: Sequence[Asked]) -> None:
        self._server, self._asked = server, asked
        self._last: Round | None = None
        self.rounds: list[Round] = []
        server.serve([replace(one, at=0.0) for one in asked[:_WARM]])

    def round(self, number: int) -> None:
        self._last = self._server.serve(self._asked)

    def settle(self, timed: bool) -> None:
        if timed and self._last is not None:
            self.rounds.append(self._last)

    def row(self, taken: Samples) -> Row:
        new = sum(one.new_tokens for one in self._asked)
        whole = new + sum(len(one.ids) for one in self._asked)
        figures = spread([each.figures() for each in self.rounds])
        rates = {"new_per_second": new / taken.median, "tokens_per_second": whole / taken.median}
        return {**rates, **figures}


def measure(
    setting: Setting, model: Any, tokenizer: Any, on_round: Callable[[int], None] | None = None
) -> dict[str, Row]:
    """A row per candidate, with how many requests got other tokens than where they were alone."""
    asked = setting.load.make(text_ids(model, tokenizer, setting.load))
    warm_up(model)
    made: dict[str, _Measured] = {}
    with ExitStack() as stack:

        def start(name: str, serve: Callable[[], Server]) -> _Measured:
            server = serve()
            stack.callback(server.close)
            made[name] = _Measured(server, asked)
            return made[name]

        starts = {
            n: partial(start, n, serve) for n, serve in servers(setting, model, asked).items()
        }
        rows = run_rounds(starts, setting.rounds, setting.warmup, on_round)
    tokens = {name: each.rounds[-1].tokens for name, each in made.items() if each.rounds}
    for name, row in rows.items():
        row["differ"] = differing(tokens.get(name), tokens.get(reference(name)))
    return rows


def servers(
    setting: Setting, model: Any, asked: Sequence[Asked]
) -> dict[str, Callable[[], Server]]:
    """What makes each candidate."""
    made: dict[str, Callable[[], Server]] = {}
    for policy in setting.policies:
        made[ALONE + policy] = partial(OneByOne, model, policy, setting.chunk)
        made[BATCHED + policy] = partial(Batched, model, policy, setting.chunk, setting.running)
    if setting.theirs:
        made[THEIRS] = partial(Theirs, model, asked, setting.batch_tokens)
    return made


def reference(name: str) -> str:
    """Whose tokens a candidate should have: those of its policy one by one."""
    return ALONE + (FULL if name == THEIRS else name.split(", ", 1)[1])


def differing(own: list[list[int]] | None, other: list[list[int]] | None) -> int | None:
    """How many requests got other tokens; None where that cannot be told."""
    if own is None or other is None:
        return None
    return sum(a != b for a, b in zip(own, other, strict=True))


def capped(setting: Setting, model: Any, tokenizer: Any) -> dict[str, dict[str, Row]]:
    """Per cap and policy how many requests ran at once, and how many bytes they held at most.

    All requests are there from the first moment: what runs is what finds room.
    """
    load = replace(setting.load, rate=0.0)
    asked = load.make(text_ids(model, tokenizer, load))
    return {
        cap: {policy: _capped(setting, model, asked, policy, cap) for policy in setting.policies}
        for cap in setting.caps
    }


def _capped(setting: Setting, model: Any, asked: list[Asked], policy: str, cap: str) -> Row:
    from kvpress.store.tiers.caps import Caps

    with ExitStack() as stack:

        def start() -> _Capped:
            made = _Capped(Batched(model, policy, setting.chunk, len(asked), cap), asked)
            stack.callback(made.server.close)
            return made

        (row,) = run_rounds({policy: start}, 1, 0).values()
    given = Caps.parse(cap, None, None)
    return {**row, "cap": None if given is None else given.device}


@dataclass
class _Capped:
    """One round under a cap."""

    server: Server
    asked: list[Asked]
    last: Round | None = None

    def round(self, number: int) -> None:
        self.last = self.server.serve(self.asked)

    def settle(self, timed: bool) -> None:
        """Nothing has to be done."""

    def row(self, taken: Samples) -> Row:
        assert self.last is not None, "a row is made behind a round"
        spans = [(one.begun, one.times[-1]) for one in self.last.heard]
        return {"running": most_at_once(spans), "bytes_held": self.last.bytes_held}


def over(rows: Mapping[str, Row], name: str, base: str) -> float | None:
    """How many times as fast as another candidate, from the medians; None where not measured."""
    pair = [rows.get(each) for each in (base, name)]
    if any(row is None or row.get("error") for row in pair):
        return None
    slow, fast = (row["seconds"]["median"] for row in pair if row is not None)
    return float(slow / fast)
