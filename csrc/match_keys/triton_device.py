"""Device code of `match_keys`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.attention_sums.triton_device import load_keys, load_queries
from kvpress.csrc.triton_common import dot

# Sizes that change from call to call must not lead to another compilation.
SIZES = ["allowed_batch", "allowed_head", "keys", "slots"]


@triton.jit
def inverse_norm(key, AXIS: tl.constexpr):
    """1/|key| in fp32: 0 where the norm is 0, NaN where it is not finite."""
    squares = tl.sum(key.to(tl.float32) * key.to(tl.float32), AXIS)
    # Of 0 the inverse would be inf, with a warning where this is interpreted.
    inverse = tl.where(squares == 0, 0.0, 1.0 / tl.sqrt(tl.where(squares == 0, 1.0, squares)))
    return tl.where(squares < float("inf"), inverse, float("nan"))


@triton.jit(do_not_specialize=SIZES)
def match_kernel(
    evicted, kept, allowed, similarity, target,
    evicted_batch, evicted_head, evicted_key, evicted_width, kept_batch, kept_head, kept_slot,
    kept_width, allowed_batch, allowed_head, allowed_slot, keys, slots, HEADS: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best kept keys of a block of evicted keys of one row."""
    row = tl.program_id(1).to(tl.int64)
    sequence, head = row // HEADS, row % HEADS
    evicted += sequence * evicted_batch
    kept += sequence * kept_batch + head * kept_head
    allowed += sequence * allowed_batch + head * allowed_head
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    evicted_ED = load_queries(
        evicted, head, e_E, evicted_head, evicted_key, evicted_width, keys, D, BLOCK_D
    )
    largest_E = tl.full([BLOCK_E], float("-inf"), tl.float32)  # times |e|
    target_E = tl.full([BLOCK_E], -1, tl.int32)
    zeros_EC = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    for start in range(0, slots, BLOCK_C):
        c_C = start + tl.arange(0, BLOCK_C)
        kept_DC = load_keys(kept, c_C, kept_slot, kept_width, slots, D, BLOCK_D)
        allowed_C = tl.load(allowed + c_C.to(tl.int64) * allowed_slot, mask=c_C < slots, other=0)
        product_EC = dot(evicted_ED, kept_DC, zeros_EC, WIDE) * inverse_norm(kept_DC, 0)[None, :]
        # What is no number is never a target.
        may_EC = (allowed_C != 0)[None, :] & (product_EC == product_EC)
        product_EC = tl.where(may_EC, product_EC, float("-inf"))
        top_E, index_E = tl.max(product_EC, 1, return_indices=True)  # of equal ones the first
        larger_E = top_E > largest_E
        largest_E = tl.where(larger_E, top_E, largest_E)
        target_E = tl.where(larger_E, start + index_E, target_E)
    # Not before the loop: through it all evicted keys would stay in registers, which spill.
    inverse_E = inverse_norm(evicted_ED, 1)
    none_E = (target_E < 0) | (inverse_E != inverse_E)
    similarity_E = tl.where(none_E, 0.0, largest_E) * inverse_E
    to_E = row * keys + e_E
    tl.store(similarity + to_E, tl.where(none_E, float("-inf"), similarity_E), mask=e_E < keys)
    tl.store(target + to_E, tl.where(none_E, -1, target_E).to(tl.int64), mask=e_E < keys)
