"""Attention to the stored tokens with the largest logits, which a best-first search finds exactly.

Pages are read by their bounds until no unread one can hold a larger logit than the k-th of any
query head. Where keys of a page differ much that may be all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.ops import Logits
from kvpress.store.aging import PageAging, dense_widths, recent_slots, slot_bytes
from kvpress.store.base import KEY, LENGTH, POSITION, VALUE
from kvpress.store.chosen import Bounds, Chosen, Wanted, judged, scored, spread
from kvpress.store.found import Found
from kvpress.store.packed import PackedRows
from kvpress.types import EMPTY

_SLACK = 2.0**-14  # of |q|·|k|: more than two orders of adding 256 products differ by


class Dense(NamedTuple):
    """Pages of some rows, unpacked: fp32 but for the values."""

    logit_bNX: Tensor  # −∞ where there is no token
    value_bHXE: Tensor
    always_bNX: Tensor  # which are attended to whatever their logit


def attend_top(aging: PageAging, wanted: Wanted) -> tuple[Tensor, Tensor | None, Found]:
    """Attention output over recent slots and the `wanted.top` best old ones of each query head."""
    assert wanted.top is not None, "it was asked for"
    recent, sequences, query_bND = aging.recent, wanted.sequences, wanted.query_bND.float()
    parts = aging.filled
    keeps = [wanted.keep(recent_slots(aging, sequences), part.layout.slots) for part in parts]
    bounds = judged(scored(parts, wanted), wanted, keeps)
    found = [_search(own, query_bND, wanted) for own in bounds]
    old = [dense for _, dense in found]
    batch = len(query_bND)
    key, value, position = (recent.dense(name, sequences) for name in (KEY, VALUE, POSITION))
    last_bNX = _logits(query_bND, key, position, wanted.logits)
    logit_bNX = torch.cat([x.logit_bNX for x in old] + [last_bNX], dim=2)
    ends = logit_bNX.shape[2] - last_bNX.shape[2]
    kept_bNX = _top(logit_bNX[..., :ends], wanted.top)
    if old:
        kept_bNX |= torch.cat([x.always_bNX for x in old], dim=2)
    logit_bNX[..., :ends].masked_fill_(~kept_bNX, -torch.inf)
    weights_bNX = logit_bNX.softmax(-1)
    value_bHXE = torch.cat([*(x.value_bHXE for x in old), value], dim=2).float()
    group = (batch, recent.heads, -1, weights_bNX.shape[2])
    out_bNE = (weights_bNX.view(group) @ value_bHXE).flatten(1, 2)
    chosen = [some for some, _ in found]
    weights = None
    if wanted.need_weights:
        widths = dense_widths(aging, sequences, [x.part for x in chosen])
        spans = [x.place_rW.shape[1] * x.part.layout.slots for x in chosen]
        weights = spread(weights_bNX[:, :, None], chosen, widths, spans)
    # What was left out was left out on purpose: there is no certificate of the rest.
    nothing_bN = out_bNE.new_full(out_bNE.shape[:2], torch.nan)
    out_bN1E = out_bNE[:, :, None].to(wanted.query_bN1D.dtype)
    longest_r = out_bNE.new_full((len(wanted.slots),), torch.nan)
    missed = (nothing_bN, nothing_bN, longest_r)
    slots, each = recent_slots(aging, sequences), slot_bytes(aging)
    looked = [own.looked for own in bounds]
    found_all = Found(out_bN1E, *missed, slots, each, chosen, looked, certified=False)
    return out_bN1E, weights, found_all


def _search(own: Bounds, query_bND: Tensor, wanted: Wanted) -> tuple[Chosen, Dense]:
    """Pages of one part that hold the best tokens of every query head, and perhaps others."""
    assert wanted.top is not None, "it was asked for"
    keep_r = torch.full_like(own.pages_r, -(-wanted.top // own.slots))
    while True:
        chosen = own.choose(wanted, keep_r).narrow()
        dense = _dense(own.part, chosen, query_bND, wanted)
        open_r = _open(own, chosen, dense, query_bND, wanted) & (chosen.pages_r < own.pages_r)
        if not bool(open_r.any()):
            return chosen, dense
        keep_r = torch.where(open_r, chosen.pages_r * 2, keep_r)


def _open(own: Bounds, chosen: Chosen, dense: Dense, query_bND: Tensor, wanted: Wanted) -> Tensor:
    """Rows of which an unread page may hold a better token: bool `[r]`."""
    assert wanted.top is not None, "it was asked for"
    scaling, softcap = wanted.logits
    rows, heads = len(own.pages_r), query_bND.shape[0] * query_bND.shape[1]
    read_rW = torch.zeros_like(own.table_rW, dtype=torch.bool)
    row_A, entry_A = (chosen.place_rW >= 0).nonzero().unbind(1)
    read_rW[row_A, chosen.place_rW[row_A, entry_A].long()] = True
    longest = own.part.paging.pages(LENGTH)[:, 0].amax() if len(own.table_rW) else 0
    best_rg = own.bound_bNW.view(rows, heads // rows, -1).masked_fill(read_rW[:, None], -torch.inf)
    best_rg = best_rg.amax(2) + _SLACK * longest * query_bND.norm(dim=2).view(rows, -1)
    best_rg = _capped(best_rg * scaling, softcap)
    logit_rgX = dense.logit_bNX.view(rows, heads // rows, -1)
    if logit_rgX.shape[2] < wanted.top:
        return torch.ones_like(own.pages_r, dtype=torch.bool)
    least_rg = logit_rgX.topk(wanted.top, dim=2).values[..., -1]
    return (best_rg > least_rg).any(1)


def _dense(
    part: PackedRows,
    chosen: Chosen,
    query_bND: Tensor,
    wanted: Wanted,
) -> Dense:
    """Chosen pages, unpacked. Raises TierError where one cannot be read."""
    table, size = part.paging.table, part.layout.slots
    row_r, place_rW = table.row_index(wanted.sequences), chosen.place_rW.cpu().long()
    some_A, entry_A = (place_rW >= 0).nonzero().unbind(1)
    row_A, place_A = row_r[some_A], place_rW[some_A, entry_A]
    key_ASD, value_ASE = part.unpack(row_A, place_A)
    position_AS = place_A[:, None] * size + torch.arange(size, device="cpu")
    if POSITION in part.paging.columns:
        page_A = table.pages_RW[row_A, place_A].long()
        position_AS = part.paging.pages(POSITION)[page_A.to(table.device)]
    shape, at = (
        (len(row_r), place_rW.shape[1], size),
        (some_A.to(table.device), entry_A.to(table.device)),
    )
    key = key_ASD.new_zeros(*shape, key_ASD.shape[2])
    value = value_ASE.new_zeros(*shape, value_ASE.shape[2])
    position = torch.full(shape, EMPTY, dtype=torch.int64, device=table.device)
    key[at], value[at], position[at] = key_ASD, value_ASE, position_AS.to(table.device).long()
    sizes = (len(query_bND), table.heads, shape[1] * size)
    logit_bNX = _logits(query_bND, key.view(*sizes, -1), position.view(sizes), wanted.logits)
    before_rX = position.flatten(1) < wanted.sink_r[:, None]
    always_rX = before_rX | (position.flatten(1) >= wanted.from_r[:, None])
    always_bHX = always_rX.view(sizes)
    always_bNX = always_bHX.repeat_interleave(logit_bNX.shape[1] // table.heads, 1)
    return Dense(logit_bNX, value.view(*sizes, -1), always_bNX)


def _logits(query_bND: Tensor, key_bHXD: Tensor, position_bHX: Tensor, logits: Logits) -> Tensor:
    """The logits of all query heads `[b, N, X]`, −∞ where there is no token."""
    scaling, softcap = logits
    batch, heads, slots, width = key_bHXD.shape
    query_bHGD = query_bND.view(batch, heads, -1, width)
    logit_bHGX = _capped(query_bHGD @ key_bHXD.float().mT * scaling, softcap)
    empty_bH1X = (position_bHX == EMPTY)[:, :, None]
    return logit_bHGX.masked_fill(empty_bH1X, -torch.inf).reshape(batch, -1, slots)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def _top(logit_bNX: Tensor, count: int) -> Tensor:
    """The largest ones of every query head, of equal ones the first: bool."""
    order_bNX = logit_bNX.argsort(dim=2, descending=True, stable=True)[..., :count]
    return torch.zeros_like(logit_bNX, dtype=torch.bool).scatter_(2, order_bNX, True)
