"""Device code of `score_cells`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.score_pages.triton_device import widened


@triton.jit(do_not_specialize=["table_width"])
def cells_kernel(
    query, box, cell, table, pages, place, chosen, rank, bound, table_width, GROUP: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, BYTES: tl.constexpr,
    LEAST: tl.constexpr, SLACK: tl.constexpr, SMALL: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A named page of a row: its cells are read once for all of the row's query heads."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = tl.load(place + row * table_width + i, mask=i < tl.load(chosen + row), other=table_width)
    if w < tl.load(pages + row):
        page = tl.load(table + row * table_width + w).to(tl.int64)
        d_D, s_S = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
        low_D = widened(tl.load(box + page * 2 * D + d_D, mask=d_D < D, other=0))
        high_D = widened(tl.load(box + page * 2 * D + D + d_D, mask=d_D < D, other=0))
        extent_D = high_D - low_D
        size_D = tl.maximum(tl.abs(low_D), tl.abs(high_D)) + extent_D + LEAST
        size = tl.sum(tl.where(d_D < D, size_D, 0.0), 0)
        FIELDS: tl.constexpr = 8 // BITS
        for g in range(GROUP):
            head = row * GROUP + g
            query_D = tl.load(query + head * D + d_D, mask=d_D < D, other=0).to(tl.float32)
            part_D = query_D * (extent_D * (1.0 / (1 << BITS)))
            least = tl.sum(query_D * low_D + tl.maximum(part_D, 0.0), 0)
            # Infinite or no number where a box is: what is kept is the other bound.
            least += SLACK * tl.max(tl.abs(query_D), 0) * size + SMALL
            most = tl.full([], float("-inf"), tl.float32)
            for start in range(0, SLOTS, BLOCK_S):
                real_SD = (start + s_S < SLOTS)[:, None] & (d_D < D)[None, :]
                slot_S1 = (start + s_S)[:, None]
                unit_SD = slot_S1 // (8 * FIELDS) * ((D + 3) // 4) + d_D[None, :] // 4
                at_SD = page * BYTES + unit_SD * 32 + slot_S1 % 8 * 4 + d_D[None, :] % 4
                byte_SD = tl.load(cell + at_SD, mask=real_SD, other=0).to(tl.int32)
                code_SD = (byte_SD >> (slot_S1 // 8 % FIELDS * BITS)) & ((1 << BITS) - 1)
                x_S = tl.sum(part_D[None, :] * code_SD.to(tl.float32), 1)
                most = tl.maximum(most, tl.max(tl.where(start + s_S < SLOTS, x_S, most), 0))
            at = head * table_width + w
            fine, given = least + most, tl.load(bound + at)
            fine = tl.where(fine < given, fine, given)
            tl.store(bound + at, fine)
            tl.store(rank + at, fine)
