"""What the layers of a model hand to their attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AttentionInterface

from kvpress.hf.attention import attention
from kvpress.hf.support import NAME
from kvpress.pipe.stages.sparsify import sparse_attention


class Given(NamedTuple):
    """What a layer hands to its attention."""

    query_BNQD: Tensor
    key_BHQD: Tensor
    value_BHQE: Tensor
    scaling: float

    def sparse(self, tau_N: Tensor, local: int) -> Tensor:
        """The output with these thresholds."""
        return sparse_attention(*self, tau_N, local)[0]


@contextlib.contextmanager
def watching(see: Callable[[Given, Tensor], None]) -> Iterator[None]:
    """Hands what every layer gives to the engine's attention, and its exact output, to `see`."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = attention(module, query, key, value, *rest, **options)
        given = Given(query, key, value, options.get("scaling") or query.shape[-1] ** -0.5)
        see(given, out.transpose(1, 2))
        return out, weights

    AttentionInterface.register(NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention)
