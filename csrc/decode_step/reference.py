"""PyTorch reference of `decode_step`: its parts one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvpress.csrc.decode_rows import Operands as DecodeRows
from kvpress.csrc.decode_rows.reference import check_pages, decode_rows, pages_of
from kvpress.csrc.decode_step import RANKS, WRITES, Operands
from torch import Tensor

from kvpress.formulas.ranking import drop_one, protect, ranking
from kvpress.formulas.sums import Observation, step_sums
from kvpress.ops import shapes
from kvpress.ops.operands import Bounds, Columns, Noise, Old, Pages
from kvpress.types import EMPTY


def decode_step(operands: Operands) -> Tensor:
    """Output `[B, N, 1, E]`; changes the pools and `counts_R` in place.

    The position of the new token is seen − 1. Rows above `quota_R` then lose the unprotected slot
    that ranks lowest; their last slot takes its place. Raises OperatorError, also for old slots:
    only the C++ kernels take these.
    """
    check(operands)
    refuse_old(operands.old)
    token, pages, columns, bounds, evict, noise, logits, _ = operands
    _append(operands)
    keeps_mass = columns.mass_PS is not None
    attended = decode_rows(DecodeRows(token.query_BN1D, pages, logits, keeps_mass))
    out_BN1E, weights_BN1S = attended[0], attended[2]
    held = held_slots(pages, columns, len(bounds.seen_B))
    if columns.mass_PS is not None:
        _observe(columns.mass_PS, held, weights_BN1S[:, :, 0], bounds.seen_B, noise)
    if evict:
        victim_BH, open_BH = victims(held, columns, bounds)
        drop(pages, columns, held, victim_BH, (pages.counts_R > bounds.quota_R) & open_BH.flatten())
    return out_BN1E


def _append(operands: Operands) -> None:
    """Writes the new token behind the others of its row and counts it."""
    (key_PDS, value_PSE, table_RW, counts_R), columns = operands.pages, operands.columns
    page_R, offset_R = _place(table_RW, counts_R, key_PDS.shape[2])
    _, key_BH1D, value_BH1E = operands.token
    heads = key_BH1D.shape[1]
    position_R = (operands.bounds.seen_B - 1).repeat_interleave(heads)
    key_PDS[page_R, :, offset_R] = key_BH1D.flatten(0, 2).to(key_PDS.dtype)
    value_PSE[page_R, offset_R] = value_BH1E.flatten(0, 2).to(value_PSE.dtype)
    columns.position_PS[page_R, offset_R] = position_R.to(columns.position_PS.dtype)
    if columns.mass_PS is not None:
        columns.mass_PS[page_R, offset_R] = 0
    counts_R += 1


class Held(NamedTuple):
    """Where the slots of every row lie. Beyond its count an address is any, a position EMPTY."""

    page_RW: Tensor
    address_RS: Tensor  # page · page_slots + offset
    position_BHS: Tensor

    @property
    def held_BHS(self) -> Tensor:
        """Which slots hold a token."""
        return self.position_BHS != EMPTY

    def column(self, column_PS: Tensor) -> Tensor:
        """The numbers of all slots: `[B, H, S]`."""
        return column_PS.flatten()[self.address_RS].view(self.position_BHS.shape)


def held_slots(pages: Pages, columns: Columns, batch: int) -> Held:
    """The slots of all rows."""
    page_slots, table_RW, counts_R = pages.key_PDS.shape[2], pages.table_RW, pages.counts_R
    page_RW = pages_of(table_RW, counts_R, page_slots).view(table_RW.shape)
    slot_S = torch.arange(table_RW.shape[1] * page_slots, device=counts_R.device)
    address_RS = page_RW.repeat_interleave(page_slots, 1) * page_slots + slot_S % page_slots
    position_RS = columns.position_PS.flatten()[address_RS].long()
    position_RS = position_RS.masked_fill(slot_S >= counts_R[:, None], EMPTY)
    return Held(page_RW, address_RS, position_RS.view(batch, -1, len(slot_S)))


def _observe(
    mass_PS: Tensor, held: Held, weights_BNS: Tensor, seen_B: Tensor, noise: Noise
) -> None:
    """Adds what slots received of the new token to their masses."""
    kind, tau, seed, layer, first = noise
    observation = Observation(noise=kind, tau=tau, seed=seed)
    states = (weights_BNS, held.position_BHS, seen_B)
    sums_BHS = step_sums(*states, layer, observation, first)
    mass_BHS = held.column(mass_PS) + sums_BHS
    address_BHS = held.address_RS.view(mass_BHS.shape)
    mass_PS.view(-1)[address_BHS[held.held_BHS]] = mass_BHS[held.held_BHS]


def victims(held: Held, columns: Columns, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The slot of every row that ranks lowest, int64 `[B, H]`, and whether one may go: bool."""
    position_BHS, mass_PS = held.position_BHS, columns.mass_PS
    mass_BHS = None if mass_PS is None else held.column(mass_PS)
    score_BHS = ranking(bounds.rank, position_BHS, mass_BHS, bounds.seen_B)
    recent_BH = bounds.recent_R.view(position_BHS.shape[:2])
    guarded_BHS = protect(position_BHS, bounds.seen_B, bounds.sink_B, recent_BH)
    victim_BH = drop_one(score_BHS, position_BHS, guarded_BHS)
    return victim_BH, (~guarded_BHS & held.held_BHS).any(-1)


def drop(pages: Pages, columns: Columns, held: Held, victim_BH: Tensor, goes_R: Tensor) -> None:
    """The last slots of rows take the places of those that go."""
    key_PDS, counts_R, page_slots = pages.key_PDS, pages.counts_R, pages.key_PDS.shape[2]
    to = _place(held.page_RW, victim_BH.flatten(), page_slots)
    source = _place(held.page_RW, (counts_R - 1).clamp_min(0), page_slots)
    to_page, to_offset, page, offset = (x[goes_R] for x in (*to, *source))
    for pool in (pages.value_PSE, *columns):
        if pool is not None:
            pool[to_page, to_offset] = pool[page, offset]
    key_PDS[to_page, :, to_offset] = key_PDS[page, :, offset]
    counts_R -= goes_R.to(counts_R.dtype)


def _place(table_RW: Tensor, slot_R: Tensor, page_slots: int) -> tuple[Tensor, Tensor]:
    """The page of one slot of every row, and its place in it."""
    page_R1 = table_RW.gather(1, (slot_R // page_slots)[:, None])
    return page_R1[:, 0].long(), slot_R % page_slots


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together, but for old slots."""
    op = "decode_step"
    token, pages, columns, bounds, evict, noise, logits, _ = operands
    tensors = {**token._asdict(), **of_layer(pages, columns, bounds)}
    lengths = shapes.bind(op, tensors)
    shapes.floating(op, token._asdict())
    check_layer(op, pages, columns, bounds)
    if lengths["H"] * lengths["B"] != lengths["R"]:
        shapes.refuse(op, f"table_RW has {lengths['R']} rows; B·H = {lengths['B'] * lengths['H']}")
    shapes.paged(op, lengths, pages.table_RW, pages.counts_R, appended=1)
    shapes.apart(op, tensors, WRITES)
    check_rank(op, bounds, evict and columns.mass_PS is None)
    check_noise(op, noise)
    shapes.logits(op, *logits)
    shapes.ages(op, bounds, 1)


def of_layer(pages: Pages, columns: Columns, bounds: Bounds) -> dict[str, Tensor]:
    """The tensors of what a layer stores and may keep, by name."""
    named = {**pages._asdict(), "position_PS": columns.position_PS, **_longs(bounds)}
    return named if columns.mass_PS is None else {**named, "mass_PS": columns.mass_PS}


def check_layer(op: str, pages: Pages, columns: Columns, bounds: Bounds) -> None:
    """Raises OperatorError for other dtypes than kernels read."""
    check_pages(op, pages)
    shapes.of_dtype(op, torch.int32, {"position_PS": columns.position_PS})
    if columns.mass_PS is not None:
        shapes.of_dtype(op, torch.float32, {"mass_PS": columns.mass_PS})
    shapes.of_dtype(op, torch.int64, _longs(bounds))


def _longs(bounds: Bounds) -> dict[str, Tensor]:
    """The tensors among the bounds, by name."""
    return dict(zip(bounds._fields[:4], bounds[:4], strict=True))


def check_rank(op: str, bounds: Bounds, lacks_mass: bool) -> None:
    """Raises OperatorError for a rank that does not exist, or cannot be had."""
    if bounds.rank not in RANKS:
        shapes.refuse(op, f"rank={bounds.rank!r} is unknown; allowed: {', '.join(RANKS)}")
    if lacks_mass and bounds.rank != "position":
        shapes.refuse(op, f"rank={bounds.rank!r} needs mass_PS")


def refuse_old(old: Old) -> None:
    """Raises OperatorError for parts of old slots."""
    if old.tensors:
        shapes.refuse("decode_step", "old slots are for the C++ kernels; use decode_rows here")


def check_noise(op: str, noise: Noise) -> None:
    """Raises OperatorError for options outside their range."""
    if noise.noise not in ("none", "frozen", "fresh"):
        shapes.refuse(op, f"noise={noise.noise!r} is unknown; allowed: none, frozen, fresh")
    shapes.temperature(op, noise.tau)
