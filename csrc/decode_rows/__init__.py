"""Attention of new queries over ragged paged rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpress.formulas.page_layout import parts_of, span

SCHEMA = (
    "decode_rows(Tensor query_BNQD, Tensor key_PDS, Tensor value_PSE, Tensor table_RW, Tensor"
    " counts_R, float scaling, float softcap, bool need_weights, Tensor[] old, int[]"
    " layouts) -> (Tensor out_BNQE, Tensor lse_BNQ, Tensor weights_BNQS)"
)
MOST_QUERIES = 32


def fake(
    query_BNQD: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    table_RW: Tensor,
    counts_R: Tensor,
    scaling: float,
    softcap: float,
    need_weights: bool,
    old: Sequence[Tensor] = (),
    layouts: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of the right shape and dtype."""
    shape, slots = query_BNQD.shape[:3], table_RW.shape[1] * key_PDS.shape[2]
    parts = parts_of("decode_rows", list(old), list(layouts))
    slots += sum(span(layout, tensors[3].shape[1]) for layout, tensors in parts)
    lse_BNQ = query_BNQD.new_empty(shape, dtype=query_BNQD.float().dtype)
    weights_shape = (*shape, slots) if need_weights else (0,)
    out_BNQE = query_BNQD.new_empty(*shape, value_PSE.shape[2])
    return out_BNQE, lse_BNQ, lse_BNQ.new_empty(weights_shape)
