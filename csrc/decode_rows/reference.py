"""PyTorch reference of `decode_rows`: readable, not fast (it gathers the pages it reads)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kvpress.csrc.decode_rows import MOST_QUERIES, Operands
from kvpress.csrc.pack.reference import check_channels
from kvpress.csrc.unpack.reference import check_packed, numbers
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout, parts_of, span
from kvpress.ops import shapes
from kvpress.ops.operands import Logits, Old, Pages

OldPart = tuple[PageLayout, Sequence[Tensor]]


class Dense(NamedTuple):
    """Slots of all rows side by side, and where a query may look."""

    key_RSD: Tensor
    value_RSE: Tensor
    hidden_RQS: Tensor


def decode_rows(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, Q, E]`, LSE `[B, N, Q]` and, on demand, weights `[B, N, Q, W·S]`.

    LSE (natural logarithm) and weights are fp32. Queries are causal among themselves. A query
    without a slot to attend to gets zeros and an LSE of -inf. Old slots stand before the others,
    also in the weights. Raises OperatorError.
    """
    query_BNQD, _, logits, need_weights, _ = operands
    dense = regions("decode_rows", operands)
    key_RSD, value_RSE = (torch.cat([part[i].float() for part in dense], dim=1) for i in (0, 1))
    whole = Dense(key_RSD, value_RSE, torch.cat([part.hidden_RQS for part in dense], dim=2))
    out_BNQE, lse_BNQ, weights_BNQS = attend(query_BNQD, whole, logits)
    weights = weights_BNQS if need_weights else weights_BNQS.new_empty(0)
    return out_BNQE.to(query_BNQD.dtype), lse_BNQ, weights


def regions(op: str, operands: Operands) -> list[Dense]:
    """The slots of the parts, then those of the other pages, checked. Raises OperatorError."""
    query_BNQD, pages, logits, _, old = operands
    check(op, query_BNQD, pages, logits)
    parts, queries = check_parts(op, old, query_BNQD, pages), query_BNQD.shape[2]
    dense = [_old(layout, tensors, queries, pages.key_PDS) for layout, tensors in parts]
    return [*dense, _recent(pages, queries)]


def attend(query_BNQD: Tensor, dense: Dense, logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and weights in fp32."""
    key_RSD, value_RSE, hidden_RQS = dense
    batch, query_heads, queries, width = query_BNQD.shape
    rows, slots, _ = key_RSD.shape
    group = query_heads * batch // rows
    query_RMD = query_BNQD.float().reshape(rows, group * queries, width)  # M = G·Q
    logits_RMS = torch.matmul(query_RMD * logits.scaling, key_RSD.float().mT)
    if logits.softcap:
        logits_RMS = torch.tanh(logits_RMS / logits.softcap) * logits.softcap
    hidden_RMS = hidden_RQS[:, None].expand(rows, group, queries, slots).reshape_as(logits_RMS)
    logits_RMS = logits_RMS.masked_fill(hidden_RMS, -torch.inf)
    lse_RM = query_RMD.new_full((rows, group * queries), -torch.inf)
    if slots:
        lse_RM = logits_RMS.logsumexp(-1)
    weights_RMS = (logits_RMS - lse_RM[..., None]).exp().masked_fill(hidden_RMS, 0.0)
    out_RME = torch.matmul(weights_RMS, value_RSE.float())
    shape = (batch, query_heads, queries)
    return out_RME.view(*shape, -1), lse_RM.view(shape), weights_RMS.view(*shape, slots)


def _recent(pages: Pages, queries: int) -> Dense:
    """The slots in pages of the store's dtype."""
    key_PDS, value_PSE, table_RW, counts_R = pages
    rows, slots = len(table_RW), table_RW.shape[1] * key_PDS.shape[2]
    page_A = pages_of(table_RW, counts_R, key_PDS.shape[2])
    key_PDS, value_PSE = at_least_a_page(key_PDS), at_least_a_page(value_PSE)
    key_RSD = key_PDS[page_A].mT.reshape(rows, slots, key_PDS.shape[1])
    value_RSE = value_PSE[page_A].view(rows, slots, value_PSE.shape[2])
    slot_S = torch.arange(slots, device=counts_R.device)
    # Memory that was never written may hold NaN, and 0 · NaN is NaN.
    value_RSE = value_RSE.masked_fill((slot_S >= counts_R[:, None])[..., None], 0)
    last_RQ = counts_R[:, None] - queries + torch.arange(queries, device=counts_R.device)
    return Dense(key_RSD, value_RSE, slot_S > last_RQ[..., None])


def pages_of(table_RW: Tensor, counts_R: Tensor, page_slots: int) -> Tensor:
    """The pages that a table names, row by row; 0 where a row has no slots: int64 `[R·W]`."""
    unused_RW = ~shapes.used(table_RW, counts_R, page_slots)
    return table_RW.masked_fill(unused_RW, 0).flatten().long()


def at_least_a_page(pool_PX: Tensor) -> Tensor:
    """A pool in which page 0 exists."""
    return pool_PX if len(pool_PX) else pool_PX.new_zeros(1, *pool_PX.shape[1:])


def _old(layout: PageLayout, tensors: Sequence[Tensor], queries: int, like: Tensor) -> Dense:
    """The slots in formatted pages, unpacked; all queries see them."""
    pages, key_channels, value_channels, table_RW, counts_R, position_PS, *_ = tensors
    rows, width = table_RW.shape
    page_A = pages_of(table_RW, counts_R, layout.slots)
    pages = at_least_a_page(pages)
    channels = [x.repeat_interleave(width, 0) for x in (key_channels, value_channels)]
    key, value = numbers(pages[page_A], channels[0], channels[1], layout, like.dtype)
    slots = width * layout.slots
    slot_S = torch.arange(slots, device=counts_R.device)
    hidden_RS = slot_S >= counts_R[:, None]
    if position_PS.numel():
        hidden_RS = hidden_RS | (position_PS[page_A].view(rows, slots) < 0)
    extra = span(layout, width) - slots
    key_RSD, value_RSE = (x.view(rows, slots, x.shape[-1]) for x in (key, value))
    value_RSE = value_RSE.masked_fill((slot_S >= counts_R[:, None])[..., None], 0)
    pad = torch.nn.functional.pad
    hidden_RS = pad(hidden_RS, (0, extra), value=True)
    key_RSD, value_RSE = (pad(x, (0, 0, 0, extra)) for x in (key_RSD, value_RSE))
    return Dense(key_RSD, value_RSE, hidden_RS[:, None].expand(-1, queries, -1))


def check(op: str, query_BNQD: Tensor, pages: Pages, logits: Logits) -> None:
    """Raises OperatorError for operands that do not fit together."""
    lengths = shapes.bind(op, {"query_BNQD": query_BNQD, **pages._asdict()})
    shapes.floating(op, {"query_BNQD": query_BNQD})
    check_pages(op, pages)
    if not 1 <= lengths["Q"] <= MOST_QUERIES:
        shapes.refuse(op, f"query_BNQD has {lengths['Q']} queries; 1 to {MOST_QUERIES} are allowed")
    shapes.logits(op, *logits)
    shapes.paged(op, lengths, pages.table_RW, pages.counts_R)


def check_pages(op: str, pages: Pages) -> None:
    """Raises OperatorError for pages of other dtypes than kernels read."""
    pools = {"key_PDS": pages.key_PDS, "value_PSE": pages.value_PSE}
    shapes.floating(op, pools)
    shapes.of_dtype(op, pages.key_PDS.dtype, pools)
    shapes.of_dtype(op, torch.int32, {"table_RW": pages.table_RW})
    shapes.of_dtype(op, torch.int64, {"counts_R": pages.counts_R})


def check_parts(op: str, old: Old, query_BNQD: Tensor, pages: Pages) -> list[OldPart]:
    """The parts of old slots. Raises OperatorError for parts that do not fit the rows."""
    parts = parts_of(op, list(old.tensors), list(old.layouts))
    columns = pages.table_RW.shape[1] * pages.key_PDS.shape[2]
    for layout, tensors in parts:
        _check_part(op, layout, tensors, query_BNQD, pages)
        columns += span(layout, tensors[3].shape[1])
    if columns > shapes.MOST_SLOTS:
        shapes.refuse(op, f"rows have room for {columns} slots; at most {shapes.MOST_SLOTS}")
    return parts


def _check_part(
    op: str, layout: PageLayout, tensors: Sequence[Tensor], query_BNQD: Tensor, beside: Pages
) -> None:
    """Raises OperatorError for a part that does not fit the rows."""
    pages, key_channels, value_channels, table, counts, *_, dropped = tensors
    key_PDS, value_PSE = beside.key_PDS, beside.value_PSE
    if (layout.key_width, layout.value_width) != (key_PDS.shape[1], value_PSE.shape[2]):
        shapes.refuse(op, f"{layout} beside {key_PDS.shape[1]}, {value_PSE.shape[2]} channels")
    if layout.item_bytes != key_PDS.element_size():
        shapes.refuse(op, f"{layout} beside numbers of {key_PDS.element_size()} bytes")
    rows = len(beside.table_RW)
    _check_tensors(op, layout, tensors, rows)
    lengths = {"B": len(query_BNQD), "R": rows, "N": query_BNQD.shape[1], "S": layout.slots}
    lengths |= {"P": len(pages), "D": layout.key_width, "E": layout.value_width}
    shapes.paged(op, lengths, table, counts)
    check_packed(op, pages, layout)
    _check_old_slots(op, layout, counts, dropped)
    check_channels(op, key_channels, layout.key_width, counts)
    check_channels(op, value_channels, layout.value_width, counts)


def _check_tensors(op: str, layout: PageLayout, tensors: Sequence[Tensor], rows: int) -> None:
    """Raises OperatorError for tensors of a part that are not what the layout says."""
    pages, key_channels, value_channels, table, counts, position, mass, dropped = tensors
    shapes.of_dtype(op, torch.uint8, {"pages": pages})
    shapes.of_dtype(op, torch.int16, {"channels": key_channels, "channels ": value_channels})
    shapes.of_dtype(op, torch.int32, {"table": table, "position": position})
    shapes.of_dtype(op, torch.int64, {"counts": counts, "dropped": dropped})
    shapes.of_dtype(op, torch.float32, {"mass": mass})
    length, width = (x.shape[i] if x.dim() == 2 else -1 for i, x in enumerate((pages, table)))
    wanted: list[tuple[Tensor, tuple[int, ...]]] = [
        (pages, (length, layout.page_bytes)),
        (key_channels, (rows, layout.key_kept)),
        (value_channels, (rows, layout.value_kept)),
        (table, (rows, width)),
        (counts, (rows,)),
        *((x, (length, layout.slots)) for x in (position, mass) if x.numel()),
        *((x, (rows,)) for x in (dropped,) if x.numel()),
    ]
    for tensor, shape in wanted:
        if tensor.shape != shape:
            shapes.refuse(op, f"old slots in {layout}: {list(tensor.shape)}, not {list(shape)}")


def _check_old_slots(op: str, layout: PageLayout, counts_R: Tensor, dropped_R: Tensor) -> None:
    """Raises OperatorError unless rows hold whole pages, of which some slots were dropped."""
    if counts_R.device.type != "cpu":
        return
    if bool((counts_R % layout.slots != 0).any()):
        held = counts_R.tolist()
        shapes.refuse(op, f"rows hold {held} old slots; they stand in whole pages, {layout}")
    if dropped_R.numel() and bool(((dropped_R < 0) | (dropped_R > counts_R)).any()):
        shapes.refuse(op, f"rows dropped {dropped_R.tolist()} of {counts_R.tolist()} old slots")
