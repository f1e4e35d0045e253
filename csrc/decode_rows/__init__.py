"""Attention of new queries over ragged paged rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.formulas.page_layout import parts_of, span
from kvpress.ops.operands import Logits, Old, Pages, schema

MOST_QUERIES = 32


class Operands(NamedTuple):
    """The queries are those of the last Q slots of each row, in order."""

    query_BNQD: Tensor
    pages: Pages
    logits: Logits
    need_weights: bool
    old: Old = Old()


SCHEMA = schema("decode_rows", Operands, "(Tensor out_BNQE, Tensor lse_BNQ, Tensor weights_BNQS)")


def fake(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    query_BNQD, pages, _, need_weights, old = operands
    shape, slots = query_BNQD.shape[:3], pages.table_RW.shape[1] * pages.key_PDS.shape[2]
    parts = parts_of("decode_rows", list(old.tensors), list(old.layouts))
    slots += sum(span(layout, tensors[3].shape[1]) for layout, tensors in parts)
    lse_BNQ = query_BNQD.new_empty(shape, dtype=query_BNQD.float().dtype)
    weights_shape = (*shape, slots) if need_weights else (0,)
    out_BNQE = query_BNQD.new_empty(*shape, pages.value_PSE.shape[2])
    return out_BNQE, lse_BNQ, lse_BNQ.new_empty(weights_shape)
