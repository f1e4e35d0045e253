"""The options of policies: how they are declared, read from text, and written as text."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from kvpress.errors import PolicyError, did_you_mean
from kvpress.policy.budget import Budget

_LARGEST = 2**53  # of a whole number in an option: beyond it tensors overflow


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    layers: bool = False,
) -> Any:
    """A hyper-parameter: its default, its meaning with its unit, and the allowed values.

    layers: it counts layers, of which a model has only so many: `attach` refuses more.
    """
    meta = {"help": help, "low": low, "high": high, "choices": tuple(choices or ())}
    meta["layers"] = layers
    return dataclasses.field(default=default, metadata=meta)


def as_text(value: Any) -> str:
    """An option's value as a specification writes it: `none`, `true`, `0.5`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def option_types(cls: type[Any]) -> dict[str, Any]:
    """The resolved type hints of a policy's options, kept on the class once they are known."""
    if "_option_types" not in cls.__dict__:
        setattr(cls, "_option_types", get_type_hints(cls))  # noqa: B010
    hints: dict[str, Any] = cls.__dict__["_option_types"]
    return hints


def coerce(cls: type[Any], field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """An option's value in its declared type and range, from a value or from text.

    Raises PolicyError.
    """
    if hint is Budget:
        return Budget.parse(value, field.name)
    meta, where = (
        field.metadata,
        f"Option {field.name}={value!s} of policy {cls.__module__.rpartition('.')[2]!r}",
    )
    choices = meta.get("choices", ())
    if value in choices:
        return value
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and str(value).lower() == "none":
        return None
    if str in kinds and not choices and isinstance(value, str):
        return value
    number = _number(value, kinds)
    if number is None:
        wanted = [k.__name__ for k in (bool, int, float) if k in kinds] + [repr(c) for c in choices]
        wanted += ["none"] if type(None) in kinds else []
        near = did_you_mean(str(value), choices) if choices and isinstance(value, str) else ""
        raise PolicyError(f"{where} must be {' or '.join(wanted) or 'text'}.{near}")
    low, high = meta.get("low"), meta.get("high")
    high = _LARGEST if high is None and isinstance(number, int) else high
    if (low is not None and number < low) or (high is not None and number > high):
        raise PolicyError(f"{where} is out of range: allowed are values from {low} to {high}.")
    return number


def _number(value: Any, kinds: Sequence[Any]) -> Any:
    """`value` as the first of `bool`, `int`, `float` among `kinds` that fits it, or None."""
    if bool in kinds:
        return {"true": True, "false": False}.get(str(value).lower())
    if isinstance(value, bool):
        return None
    for kind in (int, float):
        if kind not in kinds or (
            kind is int and isinstance(value, float) and not value.is_integer()
        ):
            continue
        try:
            number = kind(value)
        except (TypeError, ValueError):
            continue
        if number == number and abs(number) != float("inf"):
            return number
    return None
