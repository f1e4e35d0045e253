"""Attention of the prompt phase: new tokens over what is stored plus themselves, exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress.formulas import sinks
from kvpress.types import EMPTY

_ADDED = 3  # channels at most that the engine adds to queries and keys: a bias, a position
BLOCK_ELEMENTS = 1 << 24  # largest mask or logit block of the general path
_QUERIES = 256  # that share a mask where rows are whole: few see much less than the last of them


def prompt_attention(
    query_BNQD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    position_BHS: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
    window: int | None = None,
    sink_N: Tensor | None = None,
) -> Tensor:
    """Softmax attention `[B, N, Q, D]` of the Q tokens that own the last Q slots, in order.

    Query i sees slots 0 … S − P + i that hold a token and, with a sliding `window`, whose position
    is less than `window` before its own. `position_BHS` None means that slot s holds position s in
    every row. sink_N: learned logits that take part in every softmax, without a softcap.
    """
    slots, new = key_BHSD.shape[2], query_BNQD.shape[2]
    if new == 0:
        return query_BNQD.new_zeros(*query_BNQD.shape[:3], value_BHSD.shape[-1])
    if sink_N is not None:
        states = (query_BNQD, key_BHSD, value_BHSD)
        return _with_sinks(states, position_BHS, scaling, window, sink_N)
    width = value_BHSD.shape[-1]
    if 0 < query_BNQD.shape[-1] - width <= _ADDED:  # PyTorch's fused attention takes no others
        value = F.pad(value_BHSD, (0, query_BNQD.shape[-1] - width))
        how = (position_BHS, scaling, softcap, window)
        return prompt_attention(query_BNQD, key_BHSD, value, *how)[..., :width]
    plain = position_BHS is None and slots == new and (window is None or slots <= window)
    if plain and not softcap:
        grouped = query_BNQD.shape[1] != key_BHSD.shape[1]
        return F.scaled_dot_product_attention(
            query_BNQD, key_BHSD, value_BHSD, is_causal=new > 1, scale=scaling, enable_gqa=grouped
        )
    whole = position_BHS is None or not bool((position_BHS == EMPTY).any())
    if whole and window is None and not softcap:
        return _over_whole_rows(query_BNQD, key_BHSD, value_BHSD, scaling)
    if position_BHS is None:
        position_BHS = _in_order(key_BHSD)
    step = max(1, BLOCK_ELEMENTS // max(1, query_BNQD.shape[0] * query_BNQD.shape[1] * slots))
    rest = (new, key_BHSD, value_BHSD, position_BHS, scaling, softcap, window)
    blocks = [_block(query_BNQD[:, :, i : i + step], i, *rest) for i in range(0, new, step)]
    return torch.cat(blocks, dim=2)


def _with_sinks(
    states: tuple[Tensor, Tensor, Tensor],
    position_BHS: Tensor | None,
    scaling: float,
    window: int | None,
    sink_N: Tensor,
) -> Tensor:
    """The same with learned sinks: over one slot more, whose value is 0."""
    query_BNQD, key_BHSD, value_BHSE = states
    position = _in_order(key_BHSD) if position_BHS is None else position_BHS
    query, key, position = sinks.with_slot(query_BNQD, key_BHSD, position, sink_N, scaling)
    width = value_BHSE.shape[-1]
    # Values as wide as keys: PyTorch's fused attention takes no others.
    value = F.pad(value_BHSE, (0, max(0, key.shape[-1] - width), 1, 0))
    return prompt_attention(query, key, value, position, scaling, window=window)[..., :width]


def _in_order(key_BHSD: Tensor) -> Tensor:
    """The positions of slots of which number s holds position s."""
    slots = key_BHSD.shape[2]
    return torch.arange(slots, device=key_BHSD.device).expand(*key_BHSD.shape[:2], slots)


def _over_whole_rows(
    query_BNQD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, scaling: float
) -> Tensor:
    """The same where every slot holds a token: all heads then share the masks of the queries."""
    slots, new = key_BHSD.shape[2], query_BNQD.shape[2]
    slot_S, outs = torch.arange(slots, device=key_BHSD.device), []
    grouped = query_BNQD.shape[1] != key_BHSD.shape[1]
    for start in range(0, new, _QUERIES):
        stop = min(start + _QUERIES, new)
        own_q = slot_S[slots - new + start : slots - new + stop]
        seen_S = slot_S[: slots - new + stop]
        mask_qS = query_BNQD.new_zeros(stop - start, len(seen_S))
        out_BNqD = F.scaled_dot_product_attention(
            query_BNQD[:, :, start:stop],
            key_BHSD[:, :, : len(seen_S)],
            value_BHSD[:, :, : len(seen_S)],
            attn_mask=mask_qS.masked_fill_(seen_S > own_q[:, None], -torch.inf),
            scale=scaling,
            enable_gqa=grouped,
        )
        outs.append(out_BNqD)
    return torch.cat(outs, dim=2)


def _block(
    query_BNqD: Tensor,
    start: int,
    new: int,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    position_BHS: Tensor,
    scaling: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """The attention of the queries from `start` on, over the slots that some of them see."""
    batch, query_heads, queries, width = query_BNqD.shape
    heads, slots = position_BHS.shape[1:]
    first = slots - new + start
    seen = first + queries
    key, value = key_BHSD[:, :, :seen], value_BHSD[:, :, :seen]
    visible_BHqs = _visible(position_BHS[..., :seen], first, window)
    group = query_heads // heads
    query_BHMD = query_BNqD.reshape(batch, heads, -1, width)  # M = G·p: rows are read once
    visible_BHGqs = visible_BHqs[:, :, None].expand(-1, -1, group, -1, -1)
    visible_BHMs = visible_BHGqs.reshape(batch, heads, -1, seen)
    if softcap:
        logits = torch.tanh(torch.matmul(query_BHMD * scaling, key.mT).float() / softcap) * softcap
        weights = logits.masked_fill(~visible_BHMs, -torch.inf).softmax(-1)
        out = torch.matmul(weights.to(value.dtype), value)
    else:
        out = F.scaled_dot_product_attention(
            query_BHMD, key, value, attn_mask=visible_BHMs, scale=scaling
        )
    return out.reshape(batch, query_heads, queries, -1)


def _visible(position_BHs: Tensor, first: int, window: int | None) -> Tensor:
    """Which slots each query sees, those from slot `first` on: bool `[B, H, p, s]`."""
    slot_s = torch.arange(position_BHs.shape[2], device=position_BHs.device)
    visible_BHqs = (slot_s <= slot_s[first:, None]) & (position_BHs != EMPTY)[:, :, None]
    if window is None:
        return visible_BHqs
    return visible_BHqs & (position_BHs[:, :, None] > position_BHs[..., first:, None] - window)
