"""Counter-based noise: a value depends only on its coordinates, never on shapes, order or batch.

The same (seed, layer, head, query position, key position) gives the same number in a blockwise
pass, in a decode step, alone or in a batch. The mixing step is the 32-bit finaliser of MurmurHash3
(public domain), a bijection with full avalanche.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_QUERY = -1  # the query coordinate of noise that is drawn once per key ("frozen")
_ODD = 0x9E3779B1  # 2^32 / golden ratio: neighbouring counters land far apart
_MULTIPLIERS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))


def _signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _mix(word: int) -> int:
    """The finaliser on one Python integer."""
    word &= 0xFFFFFFFF
    for shift, factor in _MULTIPLIERS:
        word = ((word ^ (word >> shift)) * factor) & 0xFFFFFFFF
    return word ^ (word >> 16)


def _mix_(word: Tensor) -> Tensor:
    """The finaliser on an int32 tensor, in place. `>>` is arithmetic there, hence the masks."""
    for shift, factor in _MULTIPLIERS:
        word.bitwise_xor_((word >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        word.mul_(_signed(factor))
    return word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))


def uniform(seed: int, layer: int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Uniform fp32 numbers in (0, 1), one per broadcast coordinate; 23 random bits each.

    `head`, `query` and `key` are integer tensors that broadcast together; `query` may be
    `NO_QUERY`.
    """
    stream = _signed(_mix(_mix(_mix(seed) + (seed >> 32)) + layer * _ODD))
    row = _mix_(head.to(torch.int32) * _signed(_ODD) + stream)
    row = _mix_(row + query.to(torch.int32) * _signed(_ODD))
    word = _mix_(row + key.to(torch.int32) * _signed(_ODD))
    # 23 bits and a half are exact in fp32; with 24 the largest number would round to 1 and its
    # logarithm to 0.
    return (word >> 9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def exponential(seed: int, layer: int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Exp(1) numbers E in (5e-8, 16.7); -log(E) is standard Gumbel and exp(gumbel) is 1/E."""
    return uniform(seed, layer, head, query, key).log_().neg_()


def gumbel(seed: int, layer: int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Standard Gumbel(0, 1) noise: mean 0.5772, standard deviation 1.2825."""
    return exponential(seed, layer, head, query, key).log_().neg_()
