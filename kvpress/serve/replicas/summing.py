"""The figures of all replicas together, in the form of one batcher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvpress.batching.stats import Stats
from kvpress.serve.replicas.member import Member
from kvpress.serve.replicas.scaling import Pressure

_COUNTED = ("preempted", "prompt_tokens", "cached_tokens", "generated_tokens", "steps")
_HELD = ("bytes_held", "bytes_full", "bytes_prefixes", "bytes_host", "bytes_disk")


@dataclass
class Outcomes:
    """Requests by how they ended, counted where they were taken. moved: begun anew elsewhere."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    moved: int = 0


class Each(NamedTuple):
    """One replica that serves. promised: bytes that its requests may come to hold."""

    number: int
    node: str
    requests: int
    bytes_held: int
    bytes_promised: int


class Replicas(NamedTuple):
    """All of them. wanted: how many the work asks for. restarts, moved: since the server began."""

    alive: int
    starting: int
    wanted: int
    restarts: int
    moved: int
    each: tuple[Each, ...]


class Past:
    """What replicas had counted that are lost or let go: counts never go back."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys((*_COUNTED, "step_seconds"), 0)

    def add(self, stats: Stats | None) -> None:
        """Keeps the last that one had counted."""
        for name in self.counts if stats is not None else ():
            self.counts[name] += getattr(stats, name)


def summed(members: Sequence[Member], past: Past, outcomes: Outcomes) -> Stats:
    """A moment of all of them; those that are starting hold nothing."""
    known = [member.stats for member in members if member.stats is not None]
    found: dict[str, Any] = {
        name: past.counts[name] + sum(getattr(stats, name) for stats in known)
        for name in past.counts
    }
    found |= {name: sum(getattr(stats, name) for stats in known) for name in _HELD}
    caps = [member.facts.capacity for member in members]
    whole = [cap for cap in caps if cap is not None]
    running = sum(member.running for member in members)
    return Stats(
        running=running,
        waiting=sum(len(member.live) for member in members) - running,
        submitted=outcomes.submitted,
        finished=outcomes.finished,
        cancelled=outcomes.cancelled,
        failed=outcomes.failed,
        refused=outcomes.refused,
        bytes_promised=sum(member.promised for member in members),
        bytes_capacity=sum(whole) if whole and len(whole) == len(caps) else None,
        last_step_at=max((member.last_step_at for member in members), default=0.0),
        tokens_per_second=sum(stats.tokens_per_second for stats in known),
        waiting_tokens=sum(stats.waiting_tokens for stats in known),
        alive=bool(members),
        **found,
    )


def pressure(stats: Stats, serving: int) -> Pressure:
    """How much work there is for those that serve."""
    share = stats.bytes_promised / stats.bytes_capacity if stats.bytes_capacity else 0.0
    rate = stats.tokens_per_second or 1.0
    return Pressure(serving, share, stats.waiting_tokens / rate)


def each_of(members: Sequence[Member]) -> tuple[Each, ...]:
    """The figures of each, by number."""
    return tuple(
        Each(
            member.number,
            member.facts.node,
            len(member.live),
            member.stats.bytes_held if member.stats is not None else 0,
            member.promised,
        )
        for member in sorted(members, key=lambda one: one.number)
    )
