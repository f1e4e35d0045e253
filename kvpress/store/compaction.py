"""Packing pages of old slots again once they have many holes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.base import PAGE, POSITION, REF
from kvpress.store.boxes import BESIDE
from kvpress.store.division import most_holes
from kvpress.store.packed import PackedRows
from kvpress.store.packing import pack
from kvpress.types import EMPTY


def compact(rows: PackedRows, row_r: Tensor) -> None:
    """Packs pages of some rows with many holes again, as far as a page or more is gained."""
    many_r = rows.dropped[row_r] > most_holes(rows.counts[row_r], rows.layout.slots)
    found = row_r[many_r].tolist()
    if found and rows.fields.overlay is not None:
        rows.unshare()
        rows.fields.end_overlay()
    for row in found:
        _compact_row(rows, row)


def _compact_row(rows: PackedRows, row: int) -> None:
    """Moves what is left of the emptiest pages into as few as hold it."""
    table, size = rows.paging.table, rows.layout.slots
    pages = int(rows.counts[row]) // size
    page_P = table.pages_RW[row, :pages].long().to(table.device)
    holes_P = (rows.paging.pages(POSITION)[page_P] == EMPTY).sum(1).cpu()
    order_P = holes_P.argsort(descending=True, stable=True)
    gained_P = holes_P[order_P].cumsum(0) // size
    gained = int(gained_P[-1])
    fewest = int((gained_P < gained).sum()) + 1  # pages that gain as much as all do
    place_A, kept = order_P[:fewest].sort().values, fewest - gained
    if kept:  # otherwise they are nothing but holes
        _refill(rows, row, place_A, kept)
    rows.dropped[row] -= gained * size
    _let_go(rows, row, pages, place_A[kept:])


def _refill(rows: PackedRows, row: int, place_A: Tensor, kept: int) -> None:
    """Packs what is left of some pages of a row into the first `kept` of them."""
    table, size = rows.paging.table, rows.layout.slots
    row_A = torch.full_like(place_A, row)
    page_A = table.pages_RW[row, place_A].long().to(table.device)
    live_L = (rows.paging.pages(POSITION)[page_A] != EMPTY).flatten().nonzero().flatten()
    # A page that is not full repeats its last slot: holes must not change steps.
    from_K = live_L[torch.arange(kept * size, device=table.device).clamp_max(len(live_L) - 1)]
    key, value = (x.flatten(0, 1)[from_K] for x in rows.unpack(row_A, place_A))
    shape, channels = (kept, size, -1), rows.channels(row_A[:kept])
    page_AX = pack(rows.layout, key.view(shape), value.view(shape), channels)
    columns = {
        name: rows.paging.pages(name)[page_A].flatten()[from_K]
        for name in rows.paging.columns
        if name not in (PAGE, REF, *BESIDE)
    }
    columns[POSITION][len(live_L) :] = EMPTY
    if rows.paging.pool.lent:
        rows.paging.own(row_A[:kept], place_A[:kept])
    slots = {name: column.view(kept, size) for name, column in columns.items()}
    rows.put(row_A[:kept], place_A[:kept], page_AX, slots)


def _let_go(rows: PackedRows, row: int, pages: int, place_A: Tensor) -> None:
    """Takes some pages out of a row; it keeps them as room behind the others."""
    table = rows.paging.table
    place_P, pages_RW = host.arange(pages), table.pages_RW.clone()
    stays_P = ~torch.isin(place_P, place_A)
    pages_RW[row, :pages] = pages_RW[row, torch.cat([place_P[stays_P], place_A])]
    table.set_pages(pages_RW)
    left = table.counts.clone()
    left[row] = int(stays_P.sum()) * table.page_slots
    rows.paging.shorten(left)
