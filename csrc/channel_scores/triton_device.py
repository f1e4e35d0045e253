"""Device code of `channel_scores`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "splits"])
def squares_kernel(
    x,
    held,
    part,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    slots,
    splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of squares of one chunk of a row."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d_D = tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    base = x + row // HEADS * stride_b + row % HEADS * stride_h
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, slots), BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        held_S = tl.load(held + row * slots + s_S, mask=s_S < slots, other=0) != 0
        from_SD = s_S.to(tl.int64)[:, None] * stride_s + d_D[None, :] * stride_d
        mask_SD = held_S[:, None] & (d_D < WIDTH)[None, :]
        x_SD = tl.load(base + from_SD, mask=mask_SD, other=0).to(tl.float32)
        sum_D += tl.sum(x_SD * x_SD, 0)
    tl.store(part + (row * splits + split) * WIDTH + d_D, sum_D, mask=d_D < WIDTH)
