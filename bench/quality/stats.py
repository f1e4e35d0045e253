"""Means with confidence intervals: a bootstrap over samples, whose questions belong together."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 2000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean, and the interval that holds it with a confidence of `LEVEL`."""

    mean: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        """As a percentage."""
        mean, low, high = (round(100 * x) for x in self[:3])
        return f"{mean} [{low}, {high}]"


def ratio_of_means(groups: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> Estimate:
    """The mean of first numbers over that of second ones, each a mean over groups of their means.

    groups: pairs of one task each. The bootstrap draws the pairs of every group anew, so that each
    task keeps its weight. Raises ValueError where there is nothing to divide by.
    """
    if not groups or not all(groups) or not sum(below for group in groups for _, below in group):
        raise ValueError("There is nothing that a mean could be compared with.")
    generator = random.Random(seed)
    drawn = ([generator.choices(group, k=len(group)) for group in groups] for _ in range(RESAMPLES))
    mean = _ratio(groups)
    low, high = _interval([made for each in drawn if (made := _ratio(each)) is not None])
    assert mean is not None, "the second numbers are not all nought"
    return Estimate(mean, low, high, sum(map(len, groups)))


def _ratio(groups: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """None where a draw holds nothing to divide by."""
    above, below = (
        statistics.fmean(statistics.fmean(pair[side] for pair in group) for group in groups)
        for side in range(2)
    )
    return above / below if below else None


def _interval(means: list[float]) -> tuple[float, float]:
    means.sort()
    tail = (1 - LEVEL) / 2
    return means[int(tail * len(means))], means[max(0, int((1 - tail) * len(means)) - 1)]


def estimate(samples: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one number per sample: percentile bootstrap (Efron 1979), the same each time."""
    values = list(samples)
    if not values:
        raise ValueError("There is no sample to estimate a mean from.")
    generator = random.Random(seed)
    low, high = _interval(
        [statistics.fmean(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    )
    return Estimate(statistics.fmean(values), low, high, len(values))
