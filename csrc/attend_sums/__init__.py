"""Attention of a prompt and its column sums, from one pass over the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpress.ops.operands import Logits, Noise, schema


class Operands(NamedTuple):
    """A whole prompt: as many queries as slots. map_BNX: the blocks that are attended to."""

    query_BNQD: Tensor
    key_BHSD: Tensor
    value_BHSE: Tensor
    position_BHS: Tensor
    logits: Logits
    noise: Noise
    map_BNX: Tensor | None = None


SCHEMA = schema("attend_sums", Operands, "(Tensor out_BNQE, Tensor sums_BNS)")


def fake(operands: Operands) -> tuple[Tensor, Tensor]:
    """Empty results of the right shapes and dtypes."""
    query_BNQD, key_BHSD, value_BHSE = operands[:3]
    out_BNQE = query_BNQD.new_empty(*query_BNQD.shape[:3], value_BHSE.shape[3])
    sums_BNS = key_BHSD.new_empty(*query_BNQD.shape[:2], key_BHSD.shape[2]).float()
    return out_BNQE, sums_BNS
