"""Attention of a prompt and its column sums, from one pass over the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SCHEMA = (
    "attend_sums(Tensor query_BNPD, Tensor key_BHSD, Tensor value_BHSE, Tensor position_BHS,"
    " float scaling, float softcap, str noise, float tau, int seed, int layer,"
    " Tensor? map_BNX=None) -> (Tensor out_BNPE, Tensor sums_BNS)"
)


def fake(
    query_BNPD: Tensor, key_BHSD: Tensor, value_BHSE: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """Empty results of the right shapes and dtypes."""
    out_BNPE = query_BNPD.new_empty(*query_BNPD.shape[:3], value_BHSE.shape[3])
    sums_BNS = key_BHSD.new_empty(*query_BNPD.shape[:2], key_BHSD.shape[2]).float()
    return out_BNPE, sums_BNS
