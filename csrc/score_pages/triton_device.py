"""Device code of `score_pages`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """Numbers in fp32. Those of bfloat16 by their bits: the interpreter rounds the smallest."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit(do_not_specialize=["table_width"])
def score_kernel(
    query, box, table, pages, bound, table_width, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Some pages of a row, read once for all of its query heads."""
    row, d_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    w_W = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    held_W = w_W < tl.load(pages + row)
    page_W = tl.load(table + row * table_width + w_W, mask=held_W, other=0).to(tl.int64)
    from_WD = box + page_W[:, None] * (2 * D) + d_D[None, :]
    real_WD = held_W[:, None] & (d_D < D)[None, :]
    low_WD = widened(tl.load(from_WD, mask=real_WD, other=0))
    high_WD = widened(tl.load(from_WD + D, mask=real_WD, other=0))
    for g in range(GROUP):
        head = row * GROUP + g
        query_1D = tl.load(query + head * D + d_D, mask=d_D < D, other=0).to(tl.float32)[None, :]
        bound_W = tl.sum(query_1D * tl.where(query_1D < 0, low_WD, high_WD), 1)
        bound_W = tl.where(bound_W == bound_W, bound_W, float("inf"))
        bound_W = tl.where(held_W, bound_W, float("-inf"))
        tl.store(bound + head * table_width + w_W, bound_W, mask=w_W < table_width)
