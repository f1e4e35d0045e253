"""Taking the last pages of old slots out again, as tokens that are not old."""

from __future__ import annotations

from torch import Tensor

from kvpress import host
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.store.packed import PackedRows
from kvpress.types import EMPTY


def take_last(rows: PackedRows, tokens_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Removes the last pages with at least so many tokens of each row: their tokens, and them.

    int64 `[R]`; keys, values and all other columns dense, `[B, H, S, ...]`.
    """
    table, size = rows.paging.table, rows.paging.table.page_slots
    live_RS = (rows.dense(POSITION) != EMPTY).flatten(0, 1).cpu()
    live_RW = live_RS.view(len(live_RS), live_RS.shape[1] // size, size).sum(2)
    from_RW = live_RW.flip(1).cumsum(1).flip(1)  # tokens of a page and those behind it
    used_RW = host.arange(live_RW.shape[1]) < (rows.counts // size)[:, None]
    taken_RW = used_RW & (from_RW - live_RW < tokens_R[:, None])
    pages_R, given_R = taken_RW.sum(1), (live_RW * taken_RW).sum(1)
    first_R = rows.counts // size - pages_R
    slot_RS = first_R[:, None] * size + host.arange(int(pages_R.max()) * size)
    taken = {}
    for name in (KEY, VALUE, POSITION, *rows.fields.volatile):
        column = rows.dense(name).flatten(0, 1)
        # Rows that give fewer slots end earlier: any slot stands for what is not there.
        index = slot_RS.clamp(0, max(0, column.shape[1] - 1)).to(column.device)
        index = index.view(*index.shape, *[1] * (column.dim() - 2))
        moved = column.gather(1, index.expand(*slot_RS.shape, *column.shape[2:]))
        if name == POSITION:
            moved = moved.masked_fill((slot_RS >= rows.counts[:, None]).to(moved.device), EMPTY)
        taken[name] = moved.view(table.sequences, table.heads, *moved.shape[1:])
    rows.dropped.sub_(pages_R * size - given_R)
    rows.paging.truncate(first_R * size)
    return given_R, taken
