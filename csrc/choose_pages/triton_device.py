"""Device code of `choose_pages`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ranks(bound, row, held_W, w_W, table_width, GROUP: tl.constexpr, BLOCK_W: tl.constexpr):
    """The largest bound of every page relative to the best of its query head: at most 0."""
    rank_W = tl.full([BLOCK_W], float("-inf"), tl.float32)
    for g in range(GROUP):
        from_W = bound + (row * GROUP + g) * table_width + w_W
        bound_W = tl.load(from_W, mask=held_W, other=float("-inf"))
        bound_W = tl.where(bound_W == bound_W, bound_W, float("inf"))
        best = tl.max(bound_W, 0)
        is_best_W = bound_W == best
        below_W = tl.where(is_best_W, 0.0, bound_W) - tl.where(is_best_W, 0.0, best)
        rank_W = tl.maximum(rank_W, below_W)
    return rank_W


@triton.jit(do_not_specialize=["table_width"])
def choose_kernel(
    bound, table, pages, span, sinks, froms, keeps, place, chosen, table_width,
    GROUP: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row: the pages whose order is lowest; it grows with the size of their (negative) rank."""
    row, w_W = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_W)
    held = tl.load(pages + row).to(tl.int32)
    held_W = w_W < held
    rank_W = ranks(bound, row, held_W, w_W, table_width, GROUP, BLOCK_W)
    page_W = tl.load(table + row * table_width + w_W, mask=held_W, other=0).to(tl.int64)
    first_W = tl.load(span + page_W * 2, mask=held_W, other=0).to(tl.int64)
    last_W = tl.load(span + page_W * 2 + 1, mask=held_W, other=0).to(tl.int64)
    always_W = (first_W < tl.load(sinks + row)) | (last_W >= tl.load(froms + row))
    always_W = always_W & held_W
    always = tl.sum(always_W.to(tl.int32), 0).to(tl.int64)
    count = tl.minimum(tl.maximum(always, tl.load(keeps + row)), held.to(tl.int64))
    tl.store(chosen + row, count)
    order_W = rank_W.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    order_W = tl.where(always_W, -1, tl.where(held_W, order_W, 0x7FFFFFFF))
    end = tl.zeros([], tl.int32)  # bit by bit the largest number with fewer than `count` below it
    for bit in range(31):
        next_end = end | (1 << (30 - bit))
        below = tl.sum((order_W < next_end).to(tl.int32), 0)
        end = tl.where(below < count, next_end, end)
    equal_W = held_W & (order_W == end)
    left = count - tl.sum((order_W < end).to(tl.int32), 0)
    taken_W = held_W & (order_W < end)
    taken_W = taken_W | (equal_W & (tl.cumsum(equal_W.to(tl.int32), 0) <= left))
    to_W = tl.cumsum(taken_W.to(tl.int32), 0) - 1
    place += row * table_width
    tl.store(
        place + w_W, tl.full([BLOCK_W], -1, tl.int32), mask=(w_W >= count) & (w_W < table_width)
    )
    tl.store(place + to_W, w_W, mask=taken_W)
