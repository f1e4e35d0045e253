"""Device code of `gather_slots` and `scatter_slots`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def copy_kernel(
    pool, page, slot, slots, count, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    SLOT_LAST: tl.constexpr, INTO_POOL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """A block of slots and numbers of them."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_X = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    page_N = tl.load(page + n_N, mask=n_N < count, other=0)
    slot_N = tl.load(slot + n_N, mask=n_N < count, other=0)
    if SLOT_LAST:
        pool_NX = pool + (page_N * (WIDTH * PAGE) + slot_N)[:, None] + x_X[None, :] * PAGE
    else:
        pool_NX = pool + ((page_N * PAGE + slot_N) * WIDTH)[:, None] + x_X[None, :]
    slots_NX = slots + n_N.to(tl.int64)[:, None] * WIDTH + x_X[None, :]
    mask_NX = (n_N < count)[:, None] & (x_X < WIDTH)[None, :]
    if INTO_POOL:
        tl.store(pool_NX, tl.load(slots_NX, mask=mask_NX), mask=mask_NX)
    else:
        tl.store(slots_NX, tl.load(pool_NX, mask=mask_NX), mask=mask_NX)
