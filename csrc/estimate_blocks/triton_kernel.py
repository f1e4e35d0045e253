"""Triton kernel of `estimate_blocks`: one program per block of queries of a head.

4-bit codes are multiplied as int8 with int32 sums, which every architecture has; on those with
4-bit products, and with nvcc, cuda_kernel.py takes over. All that decides is done in the same order
as in the reference, so that maps are equal to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kvpress.csrc.estimate_blocks import cuda_kernel
from kvpress.csrc.estimate_blocks.reference import HIGH, LOW, check
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor

from kvpress.formulas.block_map import GROUPS, MOST_CODE, QUERIES, SLOTS, Blocks

MOST = tl.constexpr(float(HIGH))
LEAST = tl.constexpr(float(LOW))
SCALES = tl.constexpr(GROUPS)
ROUND = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to a whole number, ties to even
SIZES = ["queries", "slots", "columns", "bytes_of_head"]


@triton.jit(do_not_specialize=SIZES)
def block_kernel(
    query, query_scale, key, key_scale, shift, threshold, offset, end, first_local, out,
    queries, slots, columns, bytes_of_head, cap, group,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes the bytes of one row of the map of one query head."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
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
                moved_MS = shift_S[None, :] * inverse_M[:, None]
                moved_MS = tl.where(moved_MS < MOST, tl.maximum(moved_MS, LEAST), MOST)
                moved_MS = (moved_MS + ROUND) - ROUND
                estimate_MS = tl.minimum(tl.maximum(dot_MS + moved_MS, LEAST), MOST)
                step_S = 1.0 / tl.load(key_scale + (kv_head * columns + j) * SCALES + s % 8 // 2)
                exact_MS = tl.floor(bound_M[:, None] * step_S[None, :])
                bound_MS = tl.where(exact_MS > cap_M[:, None], cap_M[:, None], exact_MS)
                hit_MS = (estimate_MS > bound_MS) | ((bound_MS >= LEAST) == 0)
                if tl.max(tl.max(hit_MS.to(tl.int32), 1), 0) > 0:
                    bits += 1 << k
        tl.store(out + head * bytes_of_head + begin + byte, bits.to(tl.uint8))


def estimate_blocks(
    query_BNPD: Tensor,
    query_scale_BNP: Tensor,
    key_BHSD: Tensor,
    key_scale_BHJK: Tensor,
    shift_BNS: Tensor,
    threshold_BNP: Tensor,
    local: int,
) -> Tensor:
    """The same as the reference, to the bit. Raises OperatorError."""
    operands = (query_BNPD, query_scale_BNP, key_BHSD, key_scale_BHJK, shift_BNS, threshold_BNP)
    check(*operands, local)
    if cuda_kernel.available(query_BNPD):
        return cuda_kernel.estimate_blocks(*operands, local)
    batch, heads, queries, width = query_BNPD.shape
    slots, device = key_BHSD.shape[2], query_BNPD.device
    blocks = Blocks(queries, slots)
    offsets = blocks.offsets
    map_BNX = torch.empty(batch, heads, offsets[-1], dtype=torch.uint8, device=device)
    offset, end, first_local = blocks.tables(local, device)
    with device_of(query_BNPD):
        block_kernel[(blocks.rows, batch * heads)](
            *operands,
            offset, end, first_local, map_BNX, queries, slots, blocks.columns, offsets[-1],
            float(HIGH - MOST_CODE**2 * width - 1), heads // key_BHSD.shape[1],
            WIDTH=width, BLOCK_D=max(32, triton.next_power_of_2(width)), BLOCK_M=QUERIES,
            BLOCK_S=SLOTS, num_warps=4, num_stages=2, **FUSED,
        )  # fmt: skip
    return map_BNX
