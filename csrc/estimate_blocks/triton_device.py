"""Device code of `estimate_blocks`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.estimate_blocks.reference import HIGH, LOW

from kvpress.formulas.block_map import GROUPS

MOST = tl.constexpr(float(HIGH))
LEAST = tl.constexpr(float(LOW))
SCALES = tl.constexpr(GROUPS)
ROUND = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to a whole number, ties to even
SIZES = ["queries", "slots", "columns", "bytes_of_head"]


@triton.jit
def hits(dot_MS, shift_S, inverse_M, step_S, bound_M, cap_M):
    """Where the estimate of a logit is above the threshold of its query."""
    moved_MS = shift_S[None, :] * inverse_M[:, None]
    moved_MS = tl.where(moved_MS < MOST, tl.maximum(moved_MS, LEAST), MOST)
    moved_MS = (moved_MS + ROUND) - ROUND
    estimate_MS = tl.minimum(tl.maximum(dot_MS + moved_MS, LEAST), MOST)
    exact_MS = tl.floor(bound_M[:, None] * step_S[None, :])
    bound_MS = tl.where(exact_MS > cap_M[:, None], cap_M[:, None], exact_MS)
    return (estimate_MS > bound_MS) | ((bound_MS >= LEAST) == 0)


@triton.jit(do_not_specialize=SIZES)
def block_kernel(
    query, query_scale, key, key_scale, shift, threshold, offset, end, first_local, out,
    queries, slots, columns, bytes_of_head, cap, group,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes the bytes of one row of the map of one query head."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_head = head // group
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    real = m < queries
    own = head * queries + m
    query_MD = tl.load(
        query + own[:, None] * WIDTH + d[None, :],
        mask=real[:, None] & (d[None, :] < WIDTH),
        other=0,
    )
    inverse_M = 1.0 / tl.load(query_scale + own, mask=real, other=1.0)
    threshold_M = tl.load(threshold + own, mask=real, other=float("inf"))
    bound_M = threshold_M * inverse_M
    cap_M = tl.where(threshold_M == float("inf"), float("inf"), cap)
    last = tl.load(end + row)
    local = tl.load(first_local + row)
    begin = tl.load(offset + row)
    for byte in range((last + 7) // 8):
        bits = 0
        for k in range(8):
            j = byte * 8 + k
            if (j == 0) | ((j >= local) & (j < last)):
                bits += 1 << k
            elif j < local:
                slot = j * BLOCK_S + s
                key_DS = tl.load(
                    key + (kv_head * slots + slot[None, :]) * WIDTH + d[:, None],
                    mask=d[:, None] < WIDTH,
                    other=0,
                )
                dot_MS = tl.dot(query_MD, key_DS).to(tl.float32)
                shift_S = tl.load(shift + head * slots + slot)
                step_S = 1.0 / tl.load(key_scale + (kv_head * columns + j) * SCALES + s % 8 // 2)
                hit_MS = hits(dot_MS, shift_S, inverse_M, step_S, bound_M, cap_M)
                if tl.max(tl.max(hit_MS.to(tl.int32), 1), 0) > 0:
                    bits += 1 << k
        tl.store(out + head * bytes_of_head + begin + byte, bits.to(tl.uint8))
