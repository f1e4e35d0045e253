"""The search for thresholds of sparse prompt attention (SALE, section 3.4), layer by layer.

The model reads a text with its exact attention; what every layer hands to it is attended sparsely
too, and the threshold of a head is halved until its output is near enough to the exact one. It
stays where it is from one text to the next and never grows: the bound holds for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from kvpress.bench.candidates import candidate
from torch import Tensor
from transformers import AttentionInterface

from kvpress.attachment import NAME, attention
from kvpress.calibration import Calibration
from kvpress.sparse import sparse_attention

LAST = 1e-4  # τ at which a head becomes dense


class Bound(NamedTuple):
    """How far an output may be from the exact one: the mean over tokens of ‖o − o'‖₁.

    relative: as a share of the mean of ‖o‖₁, which means the same for every model.
    """

    error: float
    relative: bool

    def of(self, exact_BNPE: Tensor, sparse_BNPE: Tensor) -> Tensor:
        """The error of every head, in units of the bound: fp32 `[N]`."""
        wrong_N = (exact_BNPE - sparse_BNPE).float().abs().sum((0, 2, 3))
        tokens = exact_BNPE.shape[0] * exact_BNPE.shape[2]
        most = exact_BNPE.float().abs().sum((0, 2, 3)) / tokens if self.relative else 1.0
        return wrong_N / tokens / most / self.error


class Given(NamedTuple):
    """What a layer hands to its attention."""

    query_BNPD: Tensor
    key_BHPD: Tensor
    value_BHPE: Tensor
    scaling: float

    def sparse(self, tau_N: Tensor, local: int) -> Tensor:
        """The output with these thresholds."""
        return sparse_attention(*self, tau_N, local)[0]


def halve(given: Given, exact_BNPE: Tensor, tau_N: Tensor, local: int, bound: Bound) -> Tensor:
    """The thresholds of the heads of a layer, each halved until the bound holds."""
    tau_N = tau_N.clone()
    wrong_N = tau_N > 0
    while bool(wrong_N.any()):
        error_N = bound.of(exact_BNPE, given.sparse(tau_N, local)).cpu()
        wrong_N = (tau_N > 0) & ~(error_N < 1)
        tau_N[wrong_N] /= 2
        tau_N[tau_N <= LAST] = 0
    return tau_N


@contextlib.contextmanager
def watching(see: Callable[[Given, Tensor], None]) -> Iterator[None]:
    """Hands what every layer gives to the engine's attention, and its exact output, to `see`."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any):  # type: ignore[no-untyped-def]
        out, weights = attention(module, query, key, value, *rest, **options)
        given = Given(query, key, value, options.get("scaling") or query.shape[-1] ** -0.5)
        see(given, out.transpose(1, 2))
        return out, weights

    AttentionInterface.register(NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention)


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
    rival = candidate(model, "full")
    for number, ids_1T in enumerate(texts):
        layer = 0

        def see(given: Given, exact_BNPE: Tensor, number: int = number) -> None:
            nonlocal layer, found
            place, layer = [number, layer], layer + 1
            if place in found.done:
                return
            tau_LN = found.tau_LN.clone()
            tau_LN[place[1]] = halve(given, exact_BNPE, tau_LN[place[1]], found.local, bound)
            found = found._replace(tau_LN=tau_LN, done=[*found.done, place])
            on_layer(found)

        if all([number, index] in found.done for index in range(len(found.tau_LN))):
            continue
        with torch.inference_mode(), watching(see):
            rival.forward(ids_1T, rival.new_cache())
    return found
