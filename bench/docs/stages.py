"""The stages of the pipe in the words of the contract, and which policies replace each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from kvpress.bench.docs.tables import code, escaped, text_table

from kvpress.policy import STAGES, Policy
from kvpress.policy.base import stages_of
from kvpress.policy.loading import available


def replaced_by() -> dict[str, list[str]]:
    """The installed policies that replace each stage, as combining them goes by."""
    found: dict[str, list[str]] = {stage.method: [] for stage in STAGES}
    for name, cls in available().items():
        own = stages_of(cls())
        for stage in STAGES:
            if stage.name in own:
                found[stage.method].append(name)
    return found


def contract() -> str:
    """A line for each stage: its method, the question that it answers, who replaces it."""
    lines = (
        (code(stage), _question(stage), ", ".join(map(code, names)) or "–")
        for stage, names in replaced_by().items()
    )
    return text_table(("method", "what it answers", "replaced by"), lines)


def _question(stage: str) -> str:
    paragraph = (inspect.getdoc(getattr(Policy, stage)) or "").split("\n\n")[0]
    return escaped(paragraph)


PARTS: Mapping[str, Callable[[], str]] = {"stages": contract}
