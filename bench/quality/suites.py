"""Which tasks, lengths and numbers of samples belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvpress.bench.quality.tasks import TASKS, Task

from kvpress.errors import KVPressError, did_you_mean

HIDDEN, VISIBLE = "hidden", "visible"
PROTOCOLS = (HIDDEN, VISIBLE)


class SuiteError(KVPressError, ValueError):
    """A suite, task or protocol that does not exist."""


class Plan(NamedTuple):
    """Samples of one task at one length, under one protocol."""

    task: Task
    tokens: int
    samples: int
    protocol: str


# suite -> task -> samples at each length; questions that could be known are asked both ways
_OFFLINE = {
    "perplexity": {2048: 5},
    "copy": {1024: 4, 2048: 4},
    "needle": {1024: 10, 2048: 5},
    "needles-2": {1024: 6},
    "needles-4": {1024: 6},
    "pairs": {1024: 2},
    "variables": {1024: 4},
    "facts": {1024: 5},
}
_QUICK = {
    "perplexity": {512: 2},
    "copy": {512: 2},
    "needle": {512: 5},
    "needles-2": {512: 2},
    "facts": {512: 2},
}
# what a compressed context must still give back, and what a system prompt must still hold
_RETRIEVAL = {
    **{name: {1024: 5} for name in ("copy", "needle", "needles-2", "needles-4")},
    **{name: {1024: 5} for name in ("pairs", "facts", "records", "lines")},
}
_SYSTEM = {"system": {1024: 5}}
_BRIEF = {512: 2}  # of a quick run
OFFLINE, RETRIEVAL = "offline", "retrieval"
SUITES = (OFFLINE, RETRIEVAL, *TASKS)


def plans(
    suites: Sequence[str],
    protocols: Sequence[str],
    quick: bool = False,
    lengths: Sequence[int] = (),
    samples: int | None = None,
) -> list[Plan]:
    """What is to be run. lengths and samples replace those of the suites. Raises SuiteError."""
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise SuiteError(
                f"The protocol {protocol!r} does not exist. Allowed: {', '.join(PROTOCOLS)}."
            )
    made = dict.fromkeys(
        plan
        for suite in suites
        for name, sizes in _tasks(suite, quick).items()
        for plan in _of_task(TASKS[name], dict.fromkeys(lengths, 5) or sizes, protocols, samples)
    )
    return list(made)


def _tasks(suite: str, quick: bool) -> dict[str, dict[int, int]]:
    if suite == OFFLINE:
        return _QUICK if quick else _OFFLINE
    if suite == RETRIEVAL:
        return {name: _BRIEF if quick else sizes for name, sizes in _RETRIEVAL.items()}
    if suite not in TASKS:
        raise SuiteError(f"The suite {suite!r} does not exist.{did_you_mean(suite, SUITES)}")
    usual = {**_RETRIEVAL, **_SYSTEM, **_OFFLINE}[suite]
    if not quick:
        return {suite: usual}
    return {suite: _QUICK.get(suite) or (usual if suite in _OFFLINE else _BRIEF)}


def _of_task(
    task: Task, sizes: dict[int, int], protocols: Sequence[str], samples: int | None
) -> Iterator[Plan]:
    for protocol in protocols if task.asks else (HIDDEN,):
        for tokens, usual in sizes.items():
            yield Plan(task, tokens, samples or usual, protocol)
