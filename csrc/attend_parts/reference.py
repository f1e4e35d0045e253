"""PyTorch reference of `attend_parts`."""

from __future__ import annotations

import torch
from kvpress.csrc.attend_parts import CHUNK, Operands
from kvpress.csrc.decode_rows.reference import Dense, attend, regions
from torch import Tensor


def attend_parts(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[J, B, N, Q, E]` and LSE `[J, B, N, Q]` of chunks; weights relative to each of them.

    All fp32. Chunks are those of the parts of old slots, part by part, then those of the other
    pages. Of a chunk without a slot to attend to the output is 0 and the LSE −∞. Raises
    OperatorError.
    """
    query_BNQD, pages, logits, need_weights, _ = operands
    chunks = [x for region in regions("attend_parts", operands) for x in _chunks(region)]
    found = [attend(query_BNQD, chunk, logits) for chunk in chunks]
    shape = query_BNQD.shape[:3]
    lse_JBNQ = torch.empty(len(found), *shape, dtype=torch.float32, device=query_BNQD.device)
    out_JBNQE = lse_JBNQ.new_empty(*lse_JBNQ.shape, pages.value_PSE.shape[2])
    for j, (out_BNQE, lse_BNQ, _) in enumerate(found):
        out_JBNQE[j], lse_JBNQ[j] = out_BNQE, lse_BNQ
    weights = [lse_JBNQ.new_empty(*shape, 0), *(x for _, _, x in found)]
    return out_JBNQE, lse_JBNQ, torch.cat(weights, -1) if need_weights else lse_JBNQ.new_empty(0)


def _chunks(region: Dense) -> list[Dense]:
    """The slots of every chunk."""
    pieces = [torch.split(x, CHUNK, dim) for x, dim in zip(region, (1, 1, 2), strict=True)]
    return [Dense(*chunk) for chunk in zip(*pieces, strict=True) if chunk[0].shape[1]]
