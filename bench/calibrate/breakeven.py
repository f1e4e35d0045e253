"""From how many tokens on sparse prompt attention is faster than exact attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress.bench.calibrate.watch import Given, watching
from kvpress.bench.common.candidates import candidate
from torch import Tensor

from kvpress.formulas.attention import prompt_attention
from kvpress.hf.calibration import Calibration

LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_LAYERS = 4  # that are timed, evenly spread
_ROUNDS = 5


def break_even(model: Any, ids_1T: Tensor, found: Calibration) -> tuple[int, dict[int, float]]:
    """The least length from which on sparse attention was never slower, and the speed-up at each.

    Both sides alternate; times are medians, summed over a few layers. Where it never paid, the
    length is the first one beyond the text.
    """
    lengths = [length for length in LENGTHS if length <= ids_1T.shape[1]]
    layers = len(found.tau_LN)
    chosen = {round(i * (layers - 1) / (_LAYERS - 1)) for i in range(_LAYERS)}
    seconds = {length: [0.0, 0.0] for length in lengths}
    layer = 0

    def see(given: Given, _: Tensor) -> None:
        nonlocal layer
        index, layer = layer, layer + 1
        if index in chosen:
            for length in lengths:
                both = _time(given, length, found.tau_LN[index], found.local)
                seconds[length] = [a + b for a, b in zip(seconds[length], both, strict=True)]

    full = candidate(model, "full")
    with torch.inference_mode(), watching(see):
        full.forward(ids_1T, full.new_cache())
    gains = {length: exact / sparse for length, (exact, sparse) in seconds.items()}
    return _first(gains), gains


def _first(gains: dict[int, float]) -> int:
    least = 2 * LENGTHS[-1] if not gains else 2 * max(gains)
    for length in sorted(gains, reverse=True):
        if gains[length] <= 1:
            break
        least = length
    return least


def _time(given: Given, length: int, tau_N: Tensor, local: int) -> Sequence[float]:
    query, key, value = (x[:, :, :length] for x in given[:3])
    part = Given(query, key, value, given.scaling)
    sides: tuple[Callable[[], Tensor], ...] = (
        lambda: prompt_attention(query, key, value, None, given.scaling),
        lambda: part.sparse(tau_N, local),
    )
    samples: list[list[float]] = [[], []]
    for round_ in range(_ROUNDS + 1):
        for taken, side in zip(samples, sides, strict=True):
            start = time.perf_counter()
            side()
            if key.is_cuda:
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]
