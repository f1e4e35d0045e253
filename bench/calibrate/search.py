"""The search for thresholds of sparse prompt attention (SALE, section 3.4), layer by layer.

The model reads a text with its exact attention; what every layer hands to it is attended sparsely
too, and the threshold of a head is halved until its output is near enough to the exact one. It
stays where it is from one text to the next and never grows: the bound holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from kvpress.bench.calibrate.watch import Given, watching
from kvpress.bench.common.candidates import candidate
from torch import Tensor

from kvpress.hf.calibration import Calibration

LAST = 1e-4  # τ at which a head becomes dense


class Bound(NamedTuple):
    """How far an output may be from the exact one: the mean over tokens of ‖o − o'‖₁.

    relative: as a share of the mean of ‖o‖₁, which means the same for every model.
    """

    error: float
    relative: bool

    def of(self, exact_BNQE: Tensor, sparse_BNQE: Tensor) -> Tensor:
        """The error of every head, in units of the bound: fp32 `[N]`."""
        wrong_N = (exact_BNQE - sparse_BNQE).float().abs().sum((0, 2, 3))
        tokens = exact_BNQE.shape[0] * exact_BNQE.shape[2]
        most = exact_BNQE.float().abs().sum((0, 2, 3)) / tokens if self.relative else 1.0
        return wrong_N / tokens / most / self.error


def halve(given: Given, exact_BNQE: Tensor, tau_N: Tensor, local: int, bound: Bound) -> Tensor:
    """The thresholds of the heads of a layer, each halved until the bound holds."""
    tau_N = tau_N.clone()
    wrong_N = tau_N > 0
    while bool(wrong_N.any()):
        error_N = bound.of(exact_BNQE, given.sparse(tau_N, local)).cpu()
        wrong_N = (tau_N > 0) & ~(error_N < 1)
        tau_N[wrong_N] /= 2
        tau_N[tau_N <= LAST] = 0
    return tau_N


def search(
    model: Any,
    texts: Sequence[Tensor],
    found: Calibration,
    bound: Bound,
    on_layer: Callable[[Calibration], None] = lambda _: None,
) -> Calibration:
    """Goes on with a calibration until all layers have seen all texts, ids `[1, T]` each.

    on_layer: gets what is known after every layer.
    """
    full = candidate(model, "full")
    for number, ids_1T in enumerate(texts):
        layer = 0

        def see(given: Given, exact_BNQE: Tensor, number: int = number) -> None:
            nonlocal layer, found
            place, layer = [number, layer], layer + 1
            if place in found.done:
                return
            tau_LN = found.tau_LN.clone()
            tau_LN[place[1]] = halve(given, exact_BNQE, tau_LN[place[1]], found.local, bound)
            found = found._replace(tau_LN=tau_LN, done=[*found.done, place])
            on_layer(found)

        if all([number, index] in found.done for index in range(len(found.tau_LN))):
            continue
        with torch.inference_mode(), watching(see):
            full.forward(ids_1T, full.new_cache())
    return found
