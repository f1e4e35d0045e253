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


def estimate(samples: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one number per sample: percentile bootstrap (Efron 1979), the same each time."""
    values = list(samples)
    if not values:
        raise ValueError("There is no sample to estimate a mean from.")
    generator = random.Random(seed)
    means = sorted(
        statistics.fmean(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    tail = (1 - LEVEL) / 2
    low, high = means[int(tail * RESAMPLES)], means[int((1 - tail) * RESAMPLES) - 1]
    return Estimate(statistics.fmean(values), low, high, len(values))
