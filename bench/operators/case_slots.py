"""The cases of `gather_slots` and `scatter_slots`: every slot of a channel-major pool."""

from __future__ import annotations

from functools import partial

import torch
from kvpress.bench.common.timing import Call
from kvpress.bench.operators import probe
from kvpress.bench.operators.registry import Case
from kvpress.bench.operators.rows import Rows, RowsShape, make_rows
from torch import Tensor

from kvpress import ops

ADDRESS_BYTES = 8


def slots_case(operator: str, shape: RowsShape, rotation: int) -> Case:
    """The keys of all rows out of their pages (`gather_slots`) or into them (`scatter_slots`)."""
    slots = sum(shape.lengths)
    size = slots * (2 * shape.width * shape.dtype.itemsize + ADDRESS_BYTES)  # read and written
    return Case(
        group=operator,
        name=shape.name,
        parameters={**shape.parameters, "layout": "channel-major"},
        bytes=size,
        flops=0,
        bound="bytes",
        prepare=partial(_prepare, operator, shape, size, rotation),
        check=partial(_check, operator, shape),
    )


def addresses(rows: Rows) -> Tensor:
    """Where every slot of every row lies in the pools, row after row: int64."""
    page_slots = rows.key_PDS.shape[2]
    slot_S = torch.arange(rows.table_RW.shape[1] * page_slots, device=rows.table_RW.device)
    address_RS = rows.table_RW.long().repeat_interleave(page_slots, 1) * page_slots
    return (address_RS + slot_S % page_slots)[slot_S < rows.counts_R[:, None]]


def _prepare(
    operator: str, shape: RowsShape, size: int, rotation: int, device: torch.device
) -> dict[str, Call]:
    rows = make_rows(shape, device)
    count, address_A = probe.copies(size, rotation), addresses(rows)
    pools = [rows.key_PDS, *(rows.key_PDS.clone() for _ in range(count - 1))]
    slots = ops.gather_slots(rows.key_PDS, address_A, True)
    dense = [slots, *(slots.clone() for _ in range(count - 1))]

    def gather(number: int) -> Tensor:
        return ops.gather_slots(pools[number % count], address_A, True)

    def scatter(number: int) -> None:
        ops.scatter_slots(pools[number % count], address_A, dense[number % count], True)

    call = gather if operator == "gather_slots" else scatter
    return {"probe": probe.memory(size, device, rotation), operator: call}


def _check(operator: str, shape: RowsShape, device: torch.device) -> str | None:
    """Bits are moved, so they must be equal."""
    rows = make_rows(shape, device)
    address_A = addresses(rows).flip(0)
    reference = ops.implementation(operator, "reference")
    if operator == "gather_slots":
        given = ops.gather_slots(rows.key_PDS, address_A, True)
        plain = reference(rows.key_PDS, address_A, True)
    else:
        slots_AD = torch.randn(len(address_A), shape.width, device=device).to(shape.dtype)
        given, plain = rows.key_PDS.clone(), rows.key_PDS.clone()
        ops.scatter_slots(given, address_A, slots_AD, True)
        reference(plain, address_A, slots_AD, True)
    return None if torch.equal(given, plain) else "slots differ from the reference's"
