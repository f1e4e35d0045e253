"""Options of `kvpress eval`: which go together, and how joined ones come apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer

_OF_LM_EVAL = frozenset({"task_folder", "limit", "metadata", "chat", "max_new_tokens"})
_OF_OUR_TASKS = frozenset(
    {
        *("suite", "files", "protocol", "quick", "length", "samples"),
        *("text", "stepwise", "seed"),
    }
)
_OF_MADE_CONTEXTS = frozenset({"quick", "text", "seed"})  # files have contexts of their own


def refuse_idle(context: typer.Context) -> None:
    """Refuses options that would change nothing beside others. Raises typer.BadParameter."""
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    if "lm_eval" in given:
        _refuse(given & _OF_OUR_TASKS, "cannot be used with --lm-eval, whose tasks are its own")
        return
    _refuse(given & _OF_LM_EVAL, "cannot be used without --lm-eval")
    if "files" in given:
        _refuse(given & _OF_MADE_CONTEXTS, "cannot be used with --files, whose prompts are given")


def _refuse(names: set[str], why: str) -> None:
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise typer.BadParameter(f"{options} {why}. Leave it out.")


def metadata_of(text: str | None) -> dict[str, Any]:
    """A JSON object, empty without a text. Raises typer.BadParameter."""
    try:
        made = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"--metadata {text} is no JSON: {error}.") from error
    if not isinstance(made, dict):
        raise typer.BadParameter(f"--metadata {text} is no JSON object, as '{{\"key\": 1}}' is.")
    return made


def split_policies(given: Sequence[str]) -> Iterator[str]:
    """Policies joined with commas, which also join the options of one: `a,b:x=1,y=2,c`."""
    for text in given:
        parts: list[str] = []
        for piece in text.split(","):
            if parts and "=" in piece and ":" not in piece.split("=")[0]:
                parts[-1] += f",{piece}"
            else:
                parts.append(piece)
        yield from parts
