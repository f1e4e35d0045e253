"""The versions that the tests prove, and a word where newer ones run."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re

# The oldest and the newest that scripts/test, scripts/oldest and scripts/pythons run with.
PROVEN = {"torch": ("2.10", "2.13"), "transformers": ("5.16.1", "5.24")}

_LOG = logging.getLogger("kvpress")


def installed(name: str) -> str | None:
    """The version of a distribution, if it is installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str, count: int = 2) -> tuple[int, ...]:
    """The first numbers of a version: (2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:count])


def unproven(name: str) -> str:
    """What to know of the installed version of `name`; empty where the tests prove it."""
    version, (oldest, newest) = installed(name), PROVEN[name]
    if version is None:
        return ""
    proven = f"which the tests prove from {oldest} to {newest}"
    if numbers(version) > numbers(newest):
        return f"{name} {version} is newer than the engine knows, {proven}"
    if numbers(version, 3) < numbers(oldest, 3):
        return f"{name} {version} is older than the engine is tested with, {proven}"
    return ""


@functools.cache
def warn() -> None:
    """Warns, once per process, of versions that the tests do not prove."""
    for name in PROVEN:
        if reason := unproven(name):
            _LOG.warning("%s. If something is wrong, try a version of that range.", reason)
