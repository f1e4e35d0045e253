"""The step as its parts, which are operators themselves, of whatever backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from kvpress.csrc.choose_pages import Operands as ChoosePages
from kvpress.csrc.decode_chosen import BESIDE, Operands
from kvpress.csrc.decode_rows import Operands as DecodeRows
from kvpress.csrc.decode_rows.reference import OldPart, check_parts
from kvpress.csrc.decode_rows.reference import check as check_rows
from kvpress.csrc.missed_mass import Operands as MissedMass
from kvpress.csrc.score_cells import Operands as ScoreCells
from kvpress.csrc.score_pages import Operands as ScorePages
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import shapes
from kvpress.ops.operands import Always, Old, Places, RowPages

_MOST = torch.iinfo(torch.int64).max


class Backend(NamedTuple):
    """The operators that the step is made of."""

    score_pages: Callable[[ScorePages], Tensor]
    choose_pages: Callable[[ChoosePages], tuple[Tensor, Tensor]]
    score_cells: Callable[[ScoreCells], tuple[Tensor, Tensor]]
    decode_rows: Callable[[DecodeRows], tuple[Tensor, Tensor, Tensor]]
    missed_mass: Callable[[MissedMass], tuple[Tensor, Tensor]]


class _Part(NamedTuple):
    """Old slots of all rows in one format, and what is found in them."""

    layout: PageLayout
    tensors: Sequence[Tensor]
    beside: Sequence[Tensor]
    rows: RowPages
    bound_BNW: Tensor
    places: Places
    judged_R: Tensor


def composed(operands: Operands, run: Backend) -> tuple[Tensor, ...]:
    """What the operator returns; see its reference. Raises OperatorError."""
    parts = check(operands)
    query_BN1D, pages, logits, _, beside = operands[:5]
    query_BND, rows = query_BN1D[:, :, 0].contiguous(), len(pages.counts_R)
    slots_R = torch.tensor(operands.slots, dtype=torch.int64, device=pages.counts_R.device)
    left_R = (slots_R - pages.counts_R).clamp_min(0)
    found = [
        _choose(operands, run, query_BND, left_R, *part, beside[BESIDE * i : BESIDE * (i + 1)])
        for i, part in enumerate(parts)
    ]
    tensors = [tensor for part in found for tensor in _chosen(part)]
    old = Old(tensors, [size for part in found for size in part.layout])
    out_BN1E, lse_BN1, _ = run.decode_rows(DecodeRows(query_BN1D, pages, logits, False, old))
    lse_BN = lse_BN1[..., 0].contiguous()
    mass_BN, length_R = torch.full_like(lse_BN, -torch.inf), lse_BN.new_zeros(rows)
    for part in found:
        chosen = (part.places, part.beside[1], logits, part.layout.slots)
        more = run.missed_mass(MissedMass(query_BND, part.bound_BNW, part.rows, *chosen))
        mass_BN, length_R = torch.logaddexp(mass_BN, more[0]), torch.maximum(length_R, more[1])
    none_RW, none_XR = pages.table_RW.new_empty(rows, 0), pages.counts_R.new_empty(0, rows)
    place_RW = torch.cat([none_RW, *(part.places.place_RW for part in found)], 1)
    chosen_XR = torch.cat([none_XR, *(part.places.chosen_R[None] for part in found)])
    judged_XR = torch.cat([none_XR, *(part.judged_R[None] for part in found)])
    return out_BN1E, lse_BN, mass_BN, length_R, place_RW, chosen_XR, judged_XR


def _choose(
    operands: Operands,
    run: Backend,
    query_BND: Tensor,
    left_R: Tensor,
    layout: PageLayout,
    tensors: Sequence[Tensor],
    beside: Sequence[Tensor],
) -> _Part:
    """Which pages of a part are read. left_R: slots that rows may read besides the recent ones."""
    table_RW, counts_R, (box_P2D, _, cell_PY, span_P2) = tensors[3], tensors[4], beside
    pages_R, keep_R = counts_R // layout.slots, left_R // layout.slots
    sink, recent, bits, candidates = operands.choice
    heads = len(pages_R) // len(operands.seen_B)
    from_R = (operands.seen_B - recent).repeat_interleave(heads)
    always = Always(span_P2, torch.full_like(pages_R, sink), from_R)
    rows, judged_R = RowPages(table_RW, pages_R), torch.zeros_like(pages_R)
    bound_BNW = rank_BNW = run.score_pages(ScorePages(query_BND, box_P2D, rows))
    if bits:
        most_R = keep_R.clamp_max(table_RW.shape[1]) * candidates
        most_R = most_R if candidates else torch.full_like(keep_R, _MOST)
        named = Places(*run.choose_pages(ChoosePages(bound_BNW, rows, always, most_R)))
        judged_R = named.chosen_R
        rank_BNW, bound_BNW = run.score_cells(
            ScoreCells(query_BND, box_P2D, cell_PY, rows, named, bound_BNW, bits, layout.slots)
        )
    places = Places(*run.choose_pages(ChoosePages(rank_BNW, rows, always, keep_R)))
    return _Part(layout, tensors, beside, rows, bound_BNW, places, judged_R)


def _chosen(part: _Part) -> list[Tensor]:
    """The part as one of which rows have the chosen pages alone."""
    table_RW = part.rows.table_RW.gather(1, part.places.place_RW.long().clamp_min(0))
    dropped = part.tensors[7].new_empty(0)  # it is counted over all pages
    slots_R = part.places.chosen_R * part.layout.slots
    return [*part.tensors[:3], table_RW, slots_R, *part.tensors[5:7], dropped]


def check(operands: Operands) -> list[OldPart]:
    """The parts. Raises OperatorError for what the operators of the step do not look at."""
    op, (query_BN1D, pages, logits, old), seen_B = "decode_chosen", operands[:4], operands.seen_B
    check_rows(op, query_BN1D, pages, logits)
    lengths = shapes.bind(op, {"query_BN1D": query_BN1D, "seen_B": seen_B, **pages._asdict()})
    shapes.of_dtype(op, torch.int64, {"seen_B": seen_B})
    parts, rows = check_parts(op, old, query_BN1D, pages), len(pages.counts_R)
    if len(operands.judged) != BESIDE * len(parts):
        tensors = f"judged has {len(operands.judged)} tensors"
        shapes.refuse(op, f"{tensors}; {len(parts)} parts have {BESIDE} each")
    if len(operands.slots) != rows or rows % lengths["B"]:
        numbers = f"slots has {len(operands.slots)} numbers"
        shapes.refuse(op, f"{numbers}, of {rows} rows of {lengths['B']}")
    if not 0 <= operands.choice.candidates <= shapes.MOST_SLOTS:
        allowed = f"0 to {shapes.MOST_SLOTS} are allowed"
        shapes.refuse(op, f"candidates is {operands.choice.candidates}; {allowed}")
    return parts
