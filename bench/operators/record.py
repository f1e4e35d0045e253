"""What a run leaves behind: the numbers as plain values, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpress.bench.common.timing import Samples
from kvpress.bench.operators.registry import PROBE, Outcome
from rich.console import Group
from rich.table import Table

from kvpress.report.tables import Fitted, new_table

FORMAT = 1
_UNITS = {"bytes": "B/s", "flops": "FLOP/s"}


def to_record(
    outcomes: Sequence[Outcome], facts: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Plain values, ready for JSON: seconds, bytes and operations per second, fractions."""
    return {
        "format": FORMAT,
        "environment": facts,
        "settings": settings,
        "cases": [_case(outcome) for outcome in outcomes],
    }


def _case(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "group": case.group,
        "name": case.name,
        "parameters": dict(case.parameters),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": case.bound,
        "refused": outcome.refused,
        "candidates": {name: _candidate(outcome, name) for name in outcome.samples},
    }


def _candidate(outcome: Outcome, name: str) -> dict[str, Any]:
    return {
        **outcome.samples[name].to_dict(),
        "work": outcome.case.work(name),
        "rate": outcome.rate(name),
        "unit": _UNITS[outcome.case.bound],
        "share_of_probe": outcome.share(name),
        "times_as_fast_as_sdpa": outcome.against_sdpa(name),
    }


def table(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> Group:
    """A table per case, one line per candidate: times, rate, share of the probe, gain over SDPA."""
    return Group(
        _title(facts),
        *(Fitted(_case_table(outcome)) for outcome in outcomes),
        "share: of the rate of a plain read of the same bytes, or a matrix product of the same"
        " size. vs SDPA: the faster of the two SDPA calls / this.",
    )


def _case_table(outcome: Outcome) -> Table:
    notes = () if outcome.refused is None else (f"refused: {outcome.refused}",)
    numbers = ("median ms", "low–high", "rate", "share", "vs SDPA")
    made = new_table(["candidate"], numbers, outcome.case.title, notes)
    for name, samples in outcome.samples.items():
        made.add_row(name, *_cells(outcome, name, samples))
    return made


def _title(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    where = facts["cpu"] if facts["device"] == "cpu" else facts["device"]
    backend = facts["backends"].get("cpu" if facts["device"] == "cpu" else "cuda", "reference")
    return (
        f"{where}, {facts['threads']} threads, torch {versions['torch']},"
        f" operators: {_plain(backend)}"
    )


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", r"\[")


def _cells(outcome: Outcome, name: str, samples: Samples) -> tuple[str, ...]:
    share, gain = outcome.share(name), outcome.against_sdpa(name)
    return (
        f"{samples.median * 1e3:.3f}",
        f"{samples.low * 1e3:.3f}–{samples.high * 1e3:.3f}",
        rate(outcome.rate(name), _UNITS[outcome.case.bound]),
        "–" if share is None or name == PROBE else f"{share:.0%}",
        "–" if gain is None else f"{gain:.2f}×",
    )


def rate(value: float, unit: str) -> str:
    """A rate in units of 10⁹ per second, or 10¹² for operations where that reads better."""
    if unit == _UNITS["flops"] and value >= 1e12:
        return f"{value / 1e12:.1f} T{unit}"
    return f"{value / 1e9:.1f} G{unit}"
