"""What an engine cache is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Lease:
    """What a cache knows of the engine that made it. Copies of a cache share it.

    active: whether the engine is still attached. weights: tells which weights its model has.
    """

    active: bool = True
    weights: Callable[[], str] = lambda: ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self
