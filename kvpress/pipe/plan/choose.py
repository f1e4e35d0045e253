"""Choosing: the first policy of a ladder that fits, or an error that says what would."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.errors import PlanError
from kvpress.formulas.sizes import readable
from kvpress.pipe.plan.fit import Asked, fit
from kvpress.pipe.plan.plan import Fit, Plan
from kvpress.policy.ladder import Rung


def choose(asked: Asked, rungs: Sequence[Rung]) -> Plan:
    """The plan with the first rung that fits. Raises PlanError where none does."""
    tried: list[Fit] = []
    for rung in rungs:
        found = fit(asked, rung)
        if found.fits:
            return Plan(asked.shape.name, asked.memory, asked.texts, found, tuple(tried))
        tried.append(found)
    raise PlanError(_nothing(asked, tried))


def _nothing(asked: Asked, tried: Sequence[Fit]) -> str:
    """Why nothing fits, with the smallest memory that would do."""
    given = f"memory={readable(asked.memory.given)}"
    known = [one for one in tried if not one.refused]
    if not known:
        return f"No policy can be planned: {'; '.join(map(str, tried))}."
    best = min(known, key=lambda one: one.needed)
    chunk = f", prompts read {best.chunk:,} tokens at a time" if best.tiered is False else ""
    return (
        f"{given} is too little for {asked.shape.name} and {asked.texts}:"
        f" {readable(asked.memory.base)} are there before the first token, reading takes"
        f" {readable(best.passing)} and keys and values {readable(best.bytes.held)}, with"
        f" {best.policy}{chunk}. Give at least memory={readable(best.needed)}, fewer or shorter"
        " sequences (batch=, length=), or host= and disk= for what does not fit."
    )
