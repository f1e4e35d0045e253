"""Decode steps of one layer in several caches at once: each as `decode_step` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Logits, schema
from kvpress.types import NoiseKind, Rank


class NewTokens(NamedTuple):
    """`query_BN1D`, `key_BH1D`, `value_BH1E` of every cache."""

    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


class Pools(NamedTuple):
    """`key_PDS`, `value_PSE`, `table_RW`, `counts_R` of every cache."""

    key_pools: Sequence[Tensor]
    value_pools: Sequence[Tensor]
    tables: Sequence[Tensor]
    counts: Sequence[Tensor]


class Beside(NamedTuple):
    """`position_PS` of every cache, and `mass_PS` of all or of none."""

    positions: Sequence[Tensor]
    masses: Sequence[Tensor]


class Stays(NamedTuple):
    """`seen_B`, `quota_R`, `recent_R`, `sink_B` of every cache."""

    seen: Sequence[Tensor]
    quotas: Sequence[Tensor]
    recents: Sequence[Tensor]
    sinks: Sequence[Tensor]
    rank: Rank


class Noises(NamedTuple):
    """`Noise`, with a temperature and a seed of every cache."""

    noise: NoiseKind
    tau: Sequence[float]
    seed: Sequence[int]
    layer: int
    first: int = 0


class Operands(NamedTuple):
    """What `decode_step` takes, of as many caches of one sequence as there are queries.

    Entry t of every list is that of cache t, with B = 1. evict: 1 where rows above their quotas
    lose a slot, else 0. Memory that is written for one belongs to no other; none has old slots.
    """

    tokens: NewTokens
    pools: Pools
    beside: Beside
    stays: Stays
    evict: Sequence[int]
    noises: Noises
    logits: Logits


WRITES = ("key_pools", "value_pools", "counts", "positions", "masses")
SCHEMA = schema("decode_steps", Operands, "Tensor out_TN1E", writes=WRITES)


def fake(operands: Operands) -> Tensor:
    """An empty result of the right shape and dtype."""
    queries, _, values = operands.tokens
    return queries[0].new_empty(len(queries), queries[0].shape[1], 1, values[0].shape[3])
