"""The cases of `decode_rows` over old slots: fewer bits and channels beside bf16 pages."""

from __future__ import annotations

from functools import partial

import torch
from kvpress.bench.common.timing import Call
from kvpress.bench.operators import probe
from kvpress.bench.operators.case_rows import copies_of
from kvpress.bench.operators.registry import Case
from kvpress.bench.operators.rows import Rows, RowsShape, make_rows
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Logits, Old

RECENT = 64  # slots of a row that stay as they came
# name -> key bits, value bits, share of key channels, tokens and channels of a group
FORMATS = {
    "bits8": (8, 8, 1.0, 128),
    "bits4": (4, 4, 1.0, 64),
    "bits2": (2, 2, 1.0, 32),
    "keep0.6": (16, 16, 0.6, 64),
    "keep0.6_bits4": (4, 4, 0.6, 64),
}


def packed_case(shape: RowsShape, rotation: int) -> Case:
    """One query per sequence: the same number of slots in every format, beside unpacked ones."""
    return Case(
        group="decode_packed",
        name=shape.name,
        parameters={**shape.parameters, "recent": RECENT},
        bytes=shape.bytes,
        flops=shape.flops,
        bound="bytes",
        prepare=partial(_prepare, shape, rotation),
        check=partial(_check, shape),
    )


def _layout(shape: RowsShape, form: str) -> PageLayout:
    key_bits, value_bits, keep, group = FORMATS[form]
    kept = shape.width - int(shape.width * (1 - keep))
    slots = max(64, group) if key_bits < 16 else 32
    groups = (min(group, slots), group)
    return PageLayout(
        slots, shape.width, shape.width, kept, shape.width, key_bits, value_bits, *groups, 2
    )


def make_old(shape: RowsShape, layout: PageLayout, device: torch.device) -> list[Tensor]:
    """Old slots of all rows, packed from random numbers."""
    rows, pages = shape.batch * shape.heads, (shape.slots - RECENT) // layout.slots
    generator = torch.Generator(device).manual_seed(7)
    numbers = [
        torch.randn(64, layout.slots, shape.width, generator=generator, device=device)
        for _ in range(2)
    ]
    key, value = (x.to(shape.dtype) for x in numbers)
    every = [torch.arange(n, device=device).short() for n in layout[3:5]]
    some = ops.pack(key, value, *(x.expand(64, -1).contiguous() for x in every), list(layout))
    page_PX = some.repeat(-(-rows * pages // 64), 1)[: rows * pages].contiguous()
    table_RW = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages)
    counts_R = torch.full((rows,), pages * layout.slots, device=device)
    none = torch.empty(0, device=device)
    own = [x.expand(rows, -1).contiguous() for x in every]
    return [page_PX, *own, table_RW, counts_R, none.int(), none, none.long()]


def _prepare(shape: RowsShape, rotation: int, device: torch.device) -> dict[str, Call]:
    unpacked = copies_of(make_rows(shape, device), shape, rotation)
    calls: dict[str, Call] = {
        "probe": probe.memory(shape.bytes, device, rotation),
        "unpacked": partial(_attend, unpacked, [Old()], shape.scaling),
    }
    for form in FORMATS:
        layout = _layout(shape, form)
        old = make_old(shape, layout, device)
        count = probe.copies(old[0].nbytes, rotation)
        copies = [Old([old[0].clone(), *old[1:]], list(layout)) for _ in range(count)]
        recent = make_rows(_recent(shape, layout), device)
        calls[form] = partial(_attend, [recent], copies, shape.scaling)
    return calls


def _recent(shape: RowsShape, layout: PageLayout) -> RowsShape:
    """The slots of every row that are not old, so that all formats hold as many."""
    from dataclasses import replace

    return replace(shape, slots=shape.slots - (shape.slots - RECENT) // layout.slots * layout.slots)


def _attend(recent: list[Rows], old: list[Old], scaling: float, number: int) -> Tensor:
    rows, parts = recent[number % len(recent)], old[number % len(old)]
    return ops.decode_rows(rows.query_BN1D, rows.pages, Logits(scaling), False, parts)[0]


def _check(shape: RowsShape, device: torch.device) -> str | None:
    """What differs from the reference by more than its README allows, if anything."""
    from kvpress.bench.operators.case_rows import smaller

    small = smaller(shape)
    for form in FORMATS:
        layout = _layout(small, form)
        old = Old(make_old(small, layout, device), list(layout))
        rows = make_rows(_recent(small, layout), device)
        given = _attend([rows], [old], small.scaling, 0)
        reference = ops.implementation("decode_rows", "reference")
        wanted = reference(rows.query_BN1D, rows.pages, Logits(small.scaling), False, old)[0]
        error = float((given - wanted).abs().max())
        if not error <= 2**-12 * 4:
            return f"{form}: output is {error:.2g} away from the reference"
    return None
