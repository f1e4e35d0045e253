"""How far two caches of the same tokens hold the same positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Positions = Sequence[Sequence[Sequence[int]]]  # of every layer and KV head
ENOUGH = 0.99  # of a row's positions, for it to count as equal


class Agreement(NamedTuple):
    """Shares of positions that both hold, of those that the fuller one holds.

    equal: of all rows together. mean, least: of rows alone. where: the layer and head of the least.
    below: rows that agree in less than 99 %, of `rows`.
    """

    equal: float
    mean: float
    least: float
    where: tuple[int, int]
    below: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return self._asdict()


def agreement(ours: Sequence[Positions], theirs: Sequence[Positions]) -> Agreement:
    """Over all layers and heads of some texts."""
    shares: list[tuple[float, int, int]] = []
    common = most = 0
    for own, other in zip(ours, theirs, strict=True):
        for layer, rows in enumerate(zip(own, other, strict=True)):
            for head, (a, b) in enumerate(zip(*rows, strict=True)):
                both, larger = len(set(a) & set(b)), max(len(a), len(b))
                common, most = common + both, most + larger
                shares.append((both / larger if larger else 1.0, layer, head))
    least, *where = min(shares)
    mean = sum(share for share, *_ in shares) / len(shares)
    below = sum(share < ENOUGH for share, *_ in shares)
    return Agreement(common / most, mean, least, (where[0], where[1]), below, len(shares))
