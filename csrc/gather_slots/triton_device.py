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
    n_A = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_X = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    page_A = tl.load(page + n_A, mask=n_A < count, other=0)
    slot_A = tl.load(slot + n_A, mask=n_A < count, other=0)
    if SLOT_LAST:
        pool_AX = pool + (page_A * (WIDTH * PAGE) + slot_A)[:, None] + x_X[None, :] * PAGE
    else:
        pool_AX = pool + ((page_A * PAGE + slot_A) * WIDTH)[:, None] + x_X[None, :]
    slots_AX = slots + n_A.to(tl.int64)[:, None] * WIDTH + x_X[None, :]
    mask_AX = (n_A < count)[:, None] & (x_X < WIDTH)[None, :]
    if INTO_POOL:
        tl.store(pool_AX, tl.load(slots_AX, mask=mask_AX), mask=mask_AX)
    else:
        tl.store(slots_AX, tl.load(pool_AX, mask=mask_AX), mask=mask_AX)
