"""Device code of `attend_parts`: what a chunk gives alone."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.triton_common import finite

SIZES = ["first_split", "splits", "first_column", "slots", "columns", "members", "items"]


@triton.jit(do_not_specialize=SIZES)
def chunk_kernel(
    top, total, part, weights, out, lse,
    first_split, splits, first_column, slots, columns, members, items,
    KEEPS: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Output and LSE of one member of a row in one chunk of a region; weights from logits."""
    item, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, e_E = first_split + chunk, tl.arange(0, BLOCK_E)
    at = (item // members * splits + split) * members + item % members
    best = tl.load(top + at)
    seen = best > float("-inf")  # of others only this was written
    norm = tl.load(total + at, mask=seen, other=1.0)
    part_E = tl.load(part + at * E + e_E, mask=e_E < tl.where(seen, E, 0), other=0)
    to = split.to(tl.int64) * items + item
    tl.store(out + to * E + e_E, part_E / norm, mask=e_E < E)
    tl.store(lse + to, best + tl.log(norm))
    if KEEPS:
        s_S = chunk * CHUNK + tl.arange(0, CHUNK)
        to_S = weights + item * columns + first_column + s_S
        logits_S = tl.load(to_S, mask=s_S < slots, other=float("-inf"))
        weights_S = tl.exp(logits_S - finite(best)) / norm
        tl.store(to_S, weights_S, mask=s_S < slots)
