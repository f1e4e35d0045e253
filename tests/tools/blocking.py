"""Operands of `estimate_blocks` and `attend_blocks`."""

from __future__ import annotations

from typing import Any

import torch

from kvpress.formulas.codes import quantise_keys, quantise_queries
from kvpress.pipe.stages import sparsify

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(
    batch: int, heads: int, kv_heads: int, queries: int, slots: int, width: int
) -> Operands:
    """Queries, keys and values whose means are not zero, with a few keys that matter."""
    query = torch.randn(batch, heads, queries, width) + torch.randn(width)
    key = torch.randn(batch, kv_heads, slots, width) + 2 * torch.randn(width)
    key[:, :, ::97] *= 3
    return query, key, torch.randn(batch, kv_heads, slots, width)


def estimate_operands(query: torch.Tensor, key: torch.Tensor, tau: float) -> tuple[Any, ...]:
    keys, own = quantise_keys(key), quantise_queries(query)
    scaling = query.shape[-1] ** -0.5
    tau_N = torch.full((query.shape[1],), tau)
    bound = sparsify.thresholds(query, key, keys.mean, scaling, tau_N, 128)
    shift = sparsify.lost_by_smoothing(own.mean, keys)
    return own.code, own.scale, keys.code, keys.scale, shift, bound, 128
