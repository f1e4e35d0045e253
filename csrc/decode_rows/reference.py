"""PyTorch reference of `decode_rows`: readable, not fast (it gathers the pages it reads)."""

from __future__ import annotations

import torch
from kvpress.csrc.decode_rows import MOST_QUERIES
from torch import Tensor

from kvpress import shapes


def decode_rows(
    query_BNQD: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    table_RW: Tensor,
    counts_R: Tensor,
    scaling: float,
    softcap: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, Q, E]`, LSE `[B, N, Q]` and, on demand, weights `[B, N, Q, W·S]`.

    LSE (natural logarithm) and weights are fp32. The Q queries belong to the last Q slots of each
    row, in order, and are causal among themselves. A query without a slot to attend to gets zeros
    and an LSE of -inf. Raises OperatorError.
    """
    check(query_BNQD, key_PDS, value_PSE, table_RW, counts_R, softcap)
    batch, query_heads, queries, width = query_BNQD.shape
    rows, page_slots = table_RW.shape[0], key_PDS.shape[2]
    slots = table_RW.shape[1] * page_slots
    page_N = table_RW.flatten().long()
    key_RDS = key_PDS[page_N].view(rows, -1, width, page_slots).transpose(1, 2).flatten(2)
    value_RSE = value_PSE[page_N].view(rows, slots, -1)
    slot_S = torch.arange(slots, device=counts_R.device)
    beyond_RS = slot_S >= counts_R[:, None]
    # Memory that was never written may hold NaN, and 0 · NaN is NaN.
    value_RSE = value_RSE.masked_fill(beyond_RS[..., None], 0)

    group = query_heads * batch // rows
    query_RMD = query_BNQD.float().reshape(rows, group * queries, width)  # M = G·Q
    logits_RMS = torch.matmul(query_RMD * scaling, key_RDS.float())
    if softcap:
        logits_RMS = torch.tanh(logits_RMS / softcap) * softcap
    last_RQ = counts_R[:, None] - queries + torch.arange(queries, device=counts_R.device)
    hidden_RQS = slot_S > last_RQ[..., None]
    hidden_RMS = hidden_RQS[:, None].expand(rows, group, queries, slots).reshape_as(logits_RMS)
    logits_RMS = logits_RMS.masked_fill(hidden_RMS, -torch.inf)
    lse_RM = logits_RMS.logsumexp(-1) if slots else query_RMD.new_full((rows, group), -torch.inf)
    weights_RMS = (logits_RMS - lse_RM[..., None]).exp().masked_fill(hidden_RMS, 0.0)
    out_RME = torch.matmul(weights_RMS, value_RSE.float()).to(query_BNQD.dtype)

    shape = (batch, query_heads, queries)
    weights = weights_RMS.view(*shape, slots) if need_weights else weights_RMS.new_empty(0)
    return out_RME.view(*shape, value_RSE.shape[-1]), lse_RM.view(shape), weights


def check(
    query_BNQD: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    table_RW: Tensor,
    counts_R: Tensor,
    softcap: float,
) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "decode_rows"
    named = {"query_BNQD": query_BNQD, "key_PDS": key_PDS, "value_PSE": value_PSE}
    lengths = shapes.bind(op, {**named, "table_RW": table_RW, "counts_R": counts_R})
    shapes.floating(op, named)
    shapes.of_dtype(op, key_PDS.dtype, {"key_PDS": key_PDS, "value_PSE": value_PSE})
    shapes.of_dtype(op, torch.int32, {"table_RW": table_RW})
    shapes.of_dtype(op, torch.int64, {"counts_R": counts_R})
    if not 1 <= lengths["Q"] <= MOST_QUERIES:
        shapes.refuse(op, f"query_BNQD has {lengths['Q']} queries; 1 to {MOST_QUERIES} are allowed")
    if softcap < 0:
        shapes.refuse(op, f"softcap is {softcap}; it must be positive, or 0 for none")
    shapes.paged(op, lengths, table_RW, counts_R)
