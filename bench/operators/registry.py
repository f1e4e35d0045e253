"""A case: one operator at one shape, its baselines, and the check before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from kvpress.bench.common.timing import Call, Samples
from torch import Tensor

from kvpress.errors import KVPressError, did_you_mean

PROBE = "probe"
BASELINES = ("sdpa", "sdpa_packed")
TINY = 1e-5  # of the largest exact value


class CaseError(KVPressError, ValueError):
    """A selection of cases that names none."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one shape.

    bytes and flops: what the operator must move and compute at least. bound: which of the two
    limits it, and therefore what the probe does. other_work: the work of candidates that do not do
    the operator's own, in the same unit.
    """

    group: str
    name: str
    parameters: Mapping[str, Any]
    bytes: int
    flops: int
    bound: Literal["bytes", "flops"]
    prepare: Callable[[torch.device], dict[str, Call]]
    check: Callable[[torch.device], str | None]  # None, or why the operator's results are wrong
    other_work: Mapping[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Group and name, by which a case is selected."""
        return f"{self.group}/{self.name}"

    def work(self, candidate: str) -> int:
        """Bytes or operations of one call of a candidate."""
        return self.other_work.get(candidate, self.bytes if self.bound == "bytes" else self.flops)


@dataclass(frozen=True)
class Outcome:
    """The times of one case, or why it was refused."""

    case: Case
    samples: Mapping[str, Samples]
    refused: str | None = None

    def rate(self, candidate: str) -> float:
        """Bytes or operations per second, from the median."""
        return self.case.work(candidate) / self.samples[candidate].median

    def share(self, candidate: str) -> float | None:
        """The rate as a fraction of the probe's; None where there is no probe."""
        return self.rate(candidate) / self.rate(PROBE) if PROBE in self.samples else None

    def against_sdpa(self, candidate: str) -> float | None:
        """How many times faster than the faster of PyTorch's attentions; None without one."""
        baselines = [self.samples[name].median for name in BASELINES if name in self.samples]
        if not baselines or candidate == PROBE:
            return None
        return min(baselines) / self.samples[candidate].median


def select(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """The cases whose title contains one of `wanted`; all if it is empty. Raises CaseError."""
    titles = [case.title for case in cases]
    for text in wanted:
        if not any(text in title for title in titles):
            raise CaseError(f"No case contains {text!r}.{did_you_mean(text, titles)}")
    return [case for case in cases if not wanted or any(text in case.title for text in wanted)]


def difference(what: str, given: Tensor, plain: Tensor, exact: Tensor) -> str | None:
    """None, or how far `given` is off: `max|given − exact|` may be `2·max|plain − exact| + tiny`.

    exact: the formula in float64. plain: PyTorch in the operator's own precision. The rule is that
    of flash-attention's tests; it needs no tolerance picked by hand for each dtype.
    """
    if given.shape != exact.shape:
        return f"{what} has shape {list(given.shape)}; it must be {list(exact.shape)}"
    if not given.numel():
        return None
    largest = exact.abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + TINY * largest
    off = (given.double() - exact).abs().max().item()
    if off <= allowed:  # False where a value is no number
        return None
    return f"{what} is off by {off:.3g}; {allowed:.3g} is allowed"
