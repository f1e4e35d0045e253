"""PyTorch reference of `decode_rows`: readable, not fast (it gathers the pages it reads)."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_rows(
    query_BNQD: Tensor,
    key_PSD: Tensor,
    value_PSD: Tensor,
    table_RW: Tensor,
    counts_R: Tensor,
    scaling: float,
    softcap: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, Q, D]`, LSE `[B, N, Q]` and, on demand, weights `[B, N, Q, S]`.

    LSE (natural logarithm) and weights are fp32. The Q queries belong to the last Q slots of each
    row, in order, and are causal among themselves. S is the largest count. A query without a slot
    to attend to gets zeros and an LSE of -inf.
    """
    batch, query_heads, queries, width = query_BNQD.shape
    rows = table_RW.shape[0]
    slots = int(counts_R.max()) if rows else 0
    table_RW = table_RW[:, : -(-slots // key_PSD.shape[1])].long()
    key_RSD = _read(key_PSD, table_RW)[:, :slots]
    value_RSD = _read(value_PSD, table_RW)[:, :slots]
    beyond_RS = torch.arange(slots, device=counts_R.device) >= counts_R[:, None]
    if bool(beyond_RS.any()):  # memory that was never written may hold NaN, and 0 · NaN is NaN
        value_RSD = value_RSD.masked_fill(beyond_RS[..., None], 0)

    group = query_heads * batch // max(rows, 1)
    query_RMD = query_BNQD.float().reshape(rows, group * queries, width)  # M = G·Q
    logits_RMS = torch.matmul(query_RMD * scaling, key_RSD.float().mT)
    if softcap:
        logits_RMS = torch.tanh(logits_RMS / softcap) * softcap
    slot_S = torch.arange(slots, device=counts_R.device)
    last_RQ = counts_R[:, None] - queries + torch.arange(queries, device=counts_R.device)
    hidden_RQS = slot_S > last_RQ[..., None]
    hidden_RMS = hidden_RQS[:, None].expand(rows, group, queries, slots).reshape_as(logits_RMS)
    logits_RMS = logits_RMS.masked_fill(hidden_RMS, -torch.inf)
    lse_RM = (
        logits_RMS.logsumexp(-1) if slots else logits_RMS.new_full(logits_RMS.shape[:2], -torch.inf)
    )
    weights_RMS = (logits_RMS - lse_RM[..., None]).exp().masked_fill(hidden_RMS, 0.0)
    out_RMD = torch.matmul(weights_RMS, value_RSD.float()).to(query_BNQD.dtype)

    shape = (batch, query_heads, queries)
    weights = weights_RMS.view(*shape, slots) if need_weights else weights_RMS.new_empty(0)
    return out_RMD.view(*shape, value_PSD.shape[-1]), lse_RM.view(shape), weights


def _read(pool_PSD: Tensor, table_RW: Tensor) -> Tensor:
    """The pages of every row, `[R, W·S, D]`:

    in place where they are consecutive, as after a prompt.
    """
    rows, pages = table_RW.shape
    flat_N = table_RW.flatten()
    consecutive = torch.arange(len(flat_N), device=flat_N.device)
    if len(flat_N) and torch.equal(flat_N, consecutive + flat_N[0]):
        read = pool_PSD[int(flat_N[0]) :][: len(flat_N)]
    else:
        read = pool_PSD.index_select(0, flat_N)
    return read.reshape(rows, pages * pool_PSD.shape[1], pool_PSD.shape[2])
