"""The time of one layer's prompt attention, sparse and as PyTorch computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from kvpress.bench.calibrate.watch import Given
from torch import Tensor
from torch.nn import functional as F

from kvpress import ops
from kvpress.formulas.block_map import Blocks, computed_blocks
from kvpress.pipe.stages.sparsify import block_map


class Row(NamedTuple):
    """One layer at one length. Seconds: of every round; density and error: means over heads.

    error: Σ|o − o'| / Σ|o|. map_bytes: of the bit map.
    """

    layer: int
    tokens: int
    exact: list[float]
    estimate: list[float]
    attend: list[float]
    density: float
    error: float
    map_bytes: int


class Total(NamedTuple):
    """All layers at one length: medians of the sums over layers, and the range of the speed-up."""

    tokens: int
    layers: int
    exact: float
    estimate: float
    attend: float
    low: float
    high: float
    density: float
    error: float

    @property
    def gain(self) -> float:
        """How often the sparse attention goes into the exact one."""
        return self.exact / (self.estimate + self.attend)


def measure(layer: int, given: Given, tau_N: Tensor, local: int, rounds: int, warm: bool) -> Row:
    """Times both sides in turn; warm: without a round before the first one that warms up."""
    query, key, value, scaling = given
    grouped = query.shape[1] != key.shape[1]
    seconds: list[list[float]] = [[], [], []]
    attend_all = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
    for round_ in range(1 if warm else 0, rounds + 1):
        exact, *took = _timed(key, partial(attend_all, query, key, value, scale=scaling))
        bits, *more = _timed(key, partial(block_map, query, key, scaling, tau_N, local))
        (sparse, _), *last = _timed(
            key, partial(ops.attend_blocks, query, key, value, bits, scaling)
        )
        if round_:
            for all_, one in zip(seconds, (*took, *more, *last), strict=True):
                all_.append(one)
    tokens = query.shape[2]
    density = float(computed_blocks(bits).double().mean()) / Blocks(tokens, tokens).causal
    error = float((exact - sparse).abs().sum() / exact.abs().sum())
    exact_s, estimate_s, attend_s = seconds
    return Row(layer, tokens, exact_s, estimate_s, attend_s, density, error, bits.nbytes)


def _timed(on: Tensor, call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    with torch.inference_mode():
        out = call()
    if on.is_cuda:
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def total(rows: Iterable[Row]) -> Total:
    """What layers of one length come to together."""
    rows = list(rows)
    rounds = [
        [sum(one[i] for one in side) for i in range(len(rows[0].exact))]
        for side in ([r.exact for r in rows], [r.estimate for r in rows], [r.attend for r in rows])
    ]
    exact, estimate, attend = map(median, rounds)
    gains = [e / (m + a) for e, m, a in zip(*rounds, strict=True)]
    density, error = (
        sum(getattr(row, name) for row in rows) / len(rows) for name in ("density", "error")
    )
    return Total(
        rows[0].tokens,
        len(rows),
        exact,
        estimate,
        attend,
        min(gains),
        max(gains),
        density,
        error,
    )
