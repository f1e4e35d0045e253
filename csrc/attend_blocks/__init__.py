"""Causal attention over the blocks of a bit map."""

from __future__ import annotations

from torch import Tensor

SCHEMA = (
    "attend_blocks(Tensor query_BNPD, Tensor key_BHSD, Tensor value_BHSE, Tensor map_BNX,"
    " float scaling) -> (Tensor out_BNPE, Tensor lse_BNP)"
)


def fake(
    query_BNPD: Tensor, key_BHSD: Tensor, value_BHSE: Tensor, map_BNX: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Empty results of the right shapes and dtypes."""
    out_BNPE = query_BNPD.new_empty(*query_BNPD.shape[:3], value_BHSE.shape[3])
    return out_BNPE, query_BNPD.new_empty(query_BNPD.shape[:3]).float()
