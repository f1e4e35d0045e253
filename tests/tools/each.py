"""Static checks of many files or names: one test each, which `--cases` cannot thin out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

_Thing = TypeVar("_Thing")
ROOT = Path(__file__).parents[2]


def each(
    things: Sequence[_Thing], name: Callable[[Any], str] = str
) -> Callable[[Callable[[_Thing], None]], Callable[[], None]]:
    """The test of all of these; it says of every one that fails why. name: what it is called."""

    def over(test: Callable[[_Thing], None]) -> Callable[[], None]:
        def whole() -> None:
            wrong = []
            for thing in things:
                try:
                    test(thing)
                except AssertionError as error:
                    wrong.append(f"{name(thing)}: {error}")
            assert not wrong, "\n".join([f"{len(wrong)} of {len(things)}", *wrong])

        whole.__name__, whole.__doc__, whole.__module__ = (
            test.__name__,
            test.__doc__,
            test.__module__,
        )
        return whole

    assert things, "a check of nothing"
    return over


def name_of(path: Path) -> str:
    """A file by its place in the repository."""
    return path.relative_to(ROOT).as_posix()
