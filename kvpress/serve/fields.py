"""Reading the fields of a JSON object: each is of its type, and none is overlooked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kvpress.errors import did_you_mean
from kvpress.serve.problems import Problem, wrong

LONGEST_NAME = 64  # characters of a name that is quoted


class Fields:
    """The fields of an object. null counts as not given.

    inside: where the object stands, for messages. Values are never quoted where they may be text of
    a user.
    """

    def __init__(self, given: Any, inside: str = "") -> None:
        self._inside = inside
        if not isinstance(given, dict):
            name = inside or "The body"
            raise wrong(inside, f"{name} must be an object, not {kind(given)}.", "invalid_type")
        self._given: Mapping[str, Any] = given
        self._known: set[str] = set()

    def path(self, name: str) -> str:
        """A field as messages call it."""
        return f"{self._inside}.{name}" if self._inside else name

    def any(self, name: str) -> Any:
        """A value as it is; None where it was not given."""
        self._known.add(name)
        return self._given.get(name)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.any(name)
        return None if value is None else whole_text(value, self.path(name))

    def needed(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise wrong(self.path(name), f"{self.path(name)} is missing.", "missing")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._not("true or false", name, value)
        return value

    def number(self, name: str) -> float | None:
        """A number, not NaN or infinite."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._not("a number", name, value)
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise wrong(self.path(name), f"{self.path(name)} must be a finite number.")
        return float(value)

    def count(self, name: str, low: int, high: int) -> int | None:
        """A whole number between two others."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._not("a whole number", name, value)
        if not low <= value <= high:
            said = value if abs(value) < 10**20 else "a number of more than 20 digits"
            message = f"{self.path(name)}={said} is not allowed. Allowed: {low} to {high}."
            raise wrong(self.path(name), message)
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list."""
        value = self.any(name)
        if value is not None and not isinstance(value, list):
            raise self._not("a list", name, value)
        return value

    def part(self, name: str) -> Fields | None:
        """An object within it."""
        value = self.any(name)
        return None if value is None else Fields(value, self.path(name))

    def only(self, name: str, allowed: Iterable[Any], why: str) -> None:
        """A field that is known, and has no other value than those that change nothing.

        Raises Problem for any other: an answer that ignored it would be a wrong one.
        """
        value = self.any(name)
        same = [each for each in allowed if type(each) is type(value) and each == value]
        if value is not None and not same:
            raise wrong(
                self.path(name), f"{self.path(name)} is not supported: {why}", "unsupported"
            )

    def nothing_else(self) -> None:
        """Raises Problem for a field that nobody has asked for."""
        for name in self._given.keys() - self._known:
            shown = "".join(c for c in str(name)[:LONGEST_NAME] if c.isprintable())
            hint = did_you_mean(shown, self._known)
            message = f"{self.path(shown)} is not a field that this server knows.{hint}"
            raise wrong(self.path(shown), message, "unknown_field")

    def _not(self, wanted: str, name: str, value: Any) -> Problem:
        message = f"{self.path(name)} must be {wanted}, not {kind(value)}."
        return wrong(self.path(name), message, "invalid_type")


def whole_text(value: Any, path: str) -> str:
    """A string that can be encoded. Raises Problem."""
    if not isinstance(value, str):
        raise wrong(path, f"{path} must be a string, not {kind(value)}.", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(path, f"{path} has half of a surrogate pair in it.") from None
    return value


def kind(value: Any) -> str:
    """What JSON calls a value."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number")
