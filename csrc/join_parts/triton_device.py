"""Device code of `join_parts`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.triton_common import finite


@triton.jit(do_not_specialize=["parts", "items"])
def join_kernel(
    part, part_lse, out, lse, parts, items,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One query of one head: the largest LSE, then the weighted outputs."""
    item, e_E = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_E)
    nothing = float("-inf")
    top = nothing
    for start in range(0, parts, BLOCK_J):
        j_J = start + tl.arange(0, BLOCK_J)
        lse_J = tl.load(part_lse + j_J * items + item, mask=j_J < parts, other=nothing)
        top = tl.maximum(top, tl.max(lse_J, 0))
    total = 0.0
    out_E = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, parts, BLOCK_J):
        j_J = start + tl.arange(0, BLOCK_J)
        from_J = j_J * items + item
        lse_J = tl.load(part_lse + from_J, mask=j_J < parts, other=nothing)
        below_J = lse_J - finite(top)
        weight_J = tl.where(below_J <= LEAST, 0.0, tl.exp(below_J))
        seen_JE = (weight_J != 0)[:, None] & (e_E < E)[None, :]
        part_JE = tl.load(part + from_J[:, None] * E + e_E[None, :], mask=seen_JE, other=0)
        total += tl.sum(weight_J, 0)
        out_E += tl.sum(weight_J[:, None] * part_JE, 0)
    whole = tl.where(total == 0, 1.0, total)
    tl.store(out + item * E + e_E, out_E / whole, mask=e_E < E)
    tl.store(lse + item, top + tl.log(whole))
