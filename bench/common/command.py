"""Commands whose options come in groups: a parameter that is a dataclass stands for its fields."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import typer


@dataclass(frozen=True)
class Command:
    """A function for typer, and an example of its use, which its help ends with."""

    call: Callable[..., None]
    example: str

    def add_to(self, app: typer.Typer, name: str | None = None) -> None:
        """Makes it a command of an application; without a name it is called as its function."""
        app.command(name, epilog=f"Example: {self.example}")(self.call)


def command(example: str) -> Callable[[Callable[..., None]], Command]:
    """Makes a command of a function.

    A parameter that is annotated with a dataclass becomes an option for each of its fields, which
    are annotated as a command's own parameters are.
    """

    def decorate(function: Callable[..., None]) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {n: kind for n, kind in hints.items() if is_dataclass(kind)}

        @functools.wraps(function)
        def call(**given: Any) -> None:
            made: dict[str, Any] = {}
            for name, kind in groups.items():
                made[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            function(**made, **given)

        vars(call)["__signature__"] = inspect.Signature(list(_options(function, hints, groups)))
        return Command(call, example)

    return decorate


def _options(
    function: Callable[..., None], hints: dict[str, Any], groups: dict[str, Any]
) -> Iterator[inspect.Parameter]:
    """The parameters of a function, its groups spread out; typer passes all of them by name."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            kind = inspect.Parameter.KEYWORD_ONLY
            yield parameter.replace(annotation=hints[name], kind=kind)
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=types[field.name],
            )
