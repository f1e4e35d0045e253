"""Attention of new queries over ragged paged rows, of which every chunk is returned by itself."""

from __future__ import annotations

from kvpress.csrc.decode_rows import Operands as Operands
from kvpress.csrc.decode_rows import fake as fake_rows
from torch import Tensor

from kvpress.formulas.page_layout import parts_of
from kvpress.ops.operands import schema

CHUNK = 512  # slots
SCHEMA = schema(
    "attend_parts", Operands, "(Tensor out_JBNQE, Tensor lse_JBNQ, Tensor weights_BNQS)"
)


def chunks_of(operands: Operands) -> list[int]:
    """How many chunks the parts of old slots and, behind them, the other pages have."""
    parts = parts_of("attend_parts", list(operands.old.tensors), list(operands.old.layouts))
    slots = [tensors[3].shape[1] * layout.slots for layout, tensors in parts]
    slots.append(operands.pages.table_RW.shape[1] * operands.pages.key_PDS.shape[2])
    return [-(-number // CHUNK) for number in slots]


def fake(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    out_BNQE, lse_BNQ, weights = fake_rows(operands)
    chunks = sum(chunks_of(operands))
    lse_JBNQ = lse_BNQ.new_empty(chunks, *lse_BNQ.shape)
    return lse_BNQ.new_empty(chunks, *out_BNQE.shape), lse_JBNQ, weights
