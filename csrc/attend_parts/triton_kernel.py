"""Triton kernels of `attend_parts`: those of `decode_rows`, and one that writes single chunks."""

from __future__ import annotations

import triton
from kvpress.csrc.attend_parts import CHUNK, Operands, fake
from kvpress.csrc.attend_parts.triton_device import chunk_kernel
from kvpress.csrc.decode_rows import triton_kernel as rows
from kvpress.csrc.decode_rows.reference import check, check_parts
from kvpress.csrc.triton_common import FUSED, device_of
from torch import Tensor


def attend_parts(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[J, B, N, Q, E]`, LSE `[J, B, N, Q]` and, on demand, weights `[B, N, Q, S]`.

    The same as the reference. Moves every key and value once per block of 16 members; partial
    outputs add 8·E bytes per member and chunk. Raises OperatorError.
    """
    query_BNQD, pages, logits, need_weights, old = operands
    check("attend_parts", query_BNQD, pages, logits)
    parts = check_parts("attend_parts", old, query_BNQD, pages)
    out_JBNQE, lse_JBNQ, weights = fake(operands)
    plan = rows.plan_of(query_BNQD, pages, parts, joins=False)
    assert (plan.chunk, plan.splits) == (CHUNK, len(lse_JBNQ)), f"{plan} of {lse_JBNQ.shape}"
    kept = weights if need_weights else None
    partials = rows.attend_chunks(query_BNQD, pages, logits, kept, parts, plan)
    items, split, column = query_BNQD.shape[:3].numel(), 0, 0
    splits, columns = [*plan.old_splits, plan.own_splits], [*plan.old_columns, plan.own_columns]
    with device_of(query_BNQD):
        for chunks, slots in zip(splits, columns, strict=True):
            if chunks:
                chunk_kernel[(items, chunks)](
                    *(*partials, out_JBNQE, lse_JBNQ, split, plan.splits, column, slots),
                    *(plan.columns, items // len(pages.table_RW), items),
                    KEEPS=need_weights,
                    E=out_JBNQE.shape[4],
                    BLOCK_E=triton.next_power_of_2(out_JBNQE.shape[4]),
                    CHUNK=CHUNK,
                    num_warps=4,
                    **FUSED,
                )
            split, column = split + chunks, column + slots
    return out_JBNQE, lse_JBNQ, weights
