"""Attention over blocks of slots, one after the other: a running softmax of every query."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 22  # largest block of logits


class RunningAttention:
    """The attention of some queries over all slots that were added, in the order of adding them.

    Everything is fp32. M = G·Q: the queries of a KV head, those of one query head after the other.
    """

    def __init__(self, query_NQD: Tensor, heads: int, width: int, scaling: float, softcap: float):
        self._shape = (*query_NQD.shape[:2], width)
        queries = query_NQD.float() * scaling
        self._query_HMD = queries.reshape(heads, -1, query_NQD.shape[2])
        self._softcap, self._queries = softcap, query_NQD.shape[1]
        shape = self._query_HMD.shape[:2]
        self._largest_HM = self._query_HMD.new_full(shape, -torch.inf)
        self._total_HM = self._query_HMD.new_zeros(shape)
        self._out_HME = self._query_HMD.new_zeros(*shape, width)

    def add(self, key_HSD: Tensor, value_HSE: Tensor, hidden: Tensor | None = None) -> None:
        """Adds slots. hidden: which of them a query does not see: `[H, 1, S]` or `[1, M, S]`."""
        key_HSD, value_HSE = key_HSD.float(), value_HSE.float()
        heads, members = self._query_HMD.shape[:2]
        step = max(1, _ELEMENTS // max(1, heads * key_HSD.shape[1]))
        for begin in range(0, members, step):
            some = slice(begin, begin + step)
            logits_HMS = self._query_HMD[:, some] @ key_HSD.mT
            if self._softcap:
                logits_HMS = torch.tanh(logits_HMS / self._softcap) * self._softcap
            if hidden is not None:
                mask = hidden if hidden.shape[1] == 1 else hidden[:, some]
                logits_HMS = logits_HMS.masked_fill(mask, -torch.inf)
            self._add(some, logits_HMS, value_HSE)

    def _add(self, some: slice, logits_HMS: Tensor, value_HSE: Tensor) -> None:
        before = self._largest_HM[:, some]
        largest = torch.maximum(before, logits_HMS.amax(-1))
        # Where nothing was seen yet the largest is -inf, and its difference to itself no number.
        anchor = largest.where(largest > -torch.inf, 0.0)
        shrink, weights = (before - anchor).exp(), (logits_HMS - anchor[..., None]).exp_()
        self._largest_HM[:, some] = largest
        self._total_HM[:, some] = self._total_HM[:, some] * shrink + weights.sum(-1)
        out = self._out_HME[:, some]
        self._out_HME[:, some] = out * shrink[..., None] + weights @ value_HSE

    def add_own(self, key_HQD: Tensor, value_HQE: Tensor) -> None:
        """Adds the slots of the queries themselves: each sees those up to its own."""
        slots, group = key_HQD.shape[1], self._query_HMD.shape[1] // self._queries
        own_M = torch.arange(self._queries, device=key_HQD.device).repeat(group)
        for begin in range(0, slots, _BLOCK):
            slot_S = torch.arange(begin, min(slots, begin + _BLOCK), device=key_HQD.device)
            some = slice(begin, begin + _BLOCK)
            hidden_1MS = (slot_S > own_M[:, None])[None]
            self.add(key_HQD[:, some], value_HQE[:, some], hidden_1MS)

    def output(self) -> Tensor:
        """The output `[N, Q, E]`; zeros for a query that saw nothing."""
        total_HM1 = self._total_HM[..., None]
        out_HME = self._out_HME / total_HM1.where(total_HM1 > 0, 1.0)
        return out_HME.reshape(self._shape)

    def lse(self) -> Tensor:
        """ln of what the exponentials sum to, `[N, Q]`; -inf for a query that saw nothing."""
        return (self._largest_HM + self._total_HM.log()).reshape(self._shape[:2])


_BLOCK = 1024  # own slots at once
