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
    e_V = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    evicted_VD = load_queries(
        evicted, head, e_V, evicted_head, evicted_key, evicted_width, keys, D, BLOCK_D
    )
    largest_V = tl.full([BLOCK_E], float("-inf"), tl.float32)  # times |e|
    target_V = tl.full([BLOCK_E], -1, tl.int32)
    zeros_VK = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    for start in range(0, slots, BLOCK_C):
        c_K = start + tl.arange(0, BLOCK_C)
        kept_DK = load_keys(kept, c_K, kept_slot, kept_width, slots, D, BLOCK_D)
        allowed_K = tl.load(allowed + c_K.to(tl.int64) * allowed_slot, mask=c_K < slots, other=0)
        product_VK = dot(evicted_VD, kept_DK, zeros_VK, WIDE) * inverse_norm(kept_DK, 0)[None, :]
        # What is no number is never a target.
        may_VK = (allowed_K != 0)[None, :] & (product_VK == product_VK)
        product_VK = tl.where(may_VK, product_VK, float("-inf"))
        top_V, index_V = tl.max(product_VK, 1, return_indices=True)  # of equal ones the first
        larger_V = top_V > largest_V
        largest_V = tl.where(larger_V, top_V, largest_V)
        target_V = tl.where(larger_V, start + index_V, target_V)
    # Not before the loop: through it all evicted keys would stay in registers, which spill.
    inverse_V = inverse_norm(evicted_VD, 1)
    none_V = (target_V < 0) | (inverse_V != inverse_V)
    similarity_V = tl.where(none_V, 0.0, largest_V) * inverse_V
    to_V = row * keys + e_V
    tl.store(similarity + to_V, tl.where(none_V, float("-inf"), similarity_V), mask=e_V < keys)
    tl.store(target + to_V, tl.where(none_V, -1, target_V).to(tl.int64), mask=e_V < keys)
