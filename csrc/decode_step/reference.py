"""PyTorch reference of `decode_step`: its parts one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpress.csrc.decode_rows.reference import decode_rows
from kvpress.csrc.decode_step import RANKS
from torch import Tensor

from kvpress.formulas.ranking import drop_one, protect, ranking
from kvpress.formulas.sums import Observation, step_sums
from kvpress.ops import shapes
from kvpress.types import EMPTY


def decode_step(
    query_BN1D: Tensor,
    key_BH1D: Tensor,
    value_BH1E: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
    quota_R: Tensor,
    recent_B: Tensor,
    sink: int,
    evict: bool,
    rank: str,
    noise: str,
    tau: float,
    seed: int,
    layer: int,
    scaling: float,
    softcap: float,
    old: Sequence[Tensor] = (),
    layouts: Sequence[int] = (),
) -> Tensor:
    """Output `[B, N, 1, E]`; changes the pools and `counts_R` in place.

    seen_B counts the new token, whose position is seen − 1. Rows above `quota_R` then lose the
    unprotected slot that ranks lowest; their last slot takes its place. Raises OperatorError, also
    for old slots: only the C++ kernels take these.
    """
    check(
        query_BN1D,
        key_BH1D,
        value_BH1E,
        key_PDS,
        value_PSE,
        position_PS,
        mass_PS,
        table_RW,
        counts_R,
        seen_B,
        quota_R,
        recent_B,
    )
    check_choices(rank, noise, tau, scaling, softcap, evict and mass_PS is None)
    shapes.ages("decode_step", seen_B, recent_B, sink, 1)
    refuse_old(old)
    batch, heads = key_BH1D.shape[:2]
    page_slots = key_PDS.shape[2]
    row_R = torch.arange(len(counts_R), device=counts_R.device)

    def place(slot_R: Tensor) -> tuple[Tensor, Tensor]:
        return table_RW[row_R, slot_R // page_slots].long(), slot_R % page_slots

    page_R, offset_R = place(counts_R)
    position_R = (seen_B - 1).repeat_interleave(heads)
    key_PDS[page_R, :, offset_R] = key_BH1D.flatten(0, 2).to(key_PDS.dtype)
    value_PSE[page_R, offset_R] = value_BH1E.flatten(0, 2).to(value_PSE.dtype)
    position_PS[page_R, offset_R] = position_R.to(position_PS.dtype)
    if mass_PS is not None:
        mass_PS[page_R, offset_R] = 0
    counts_R += 1
    out_BN1E, _, weights_BN1S = decode_rows(
        query_BN1D, key_PDS, value_PSE, table_RW, counts_R, scaling, softcap, mass_PS is not None
    )

    slot_S = torch.arange(table_RW.shape[1] * page_slots, device=counts_R.device)
    held_RS = slot_S < counts_R[:, None]
    address_RS = table_RW.long().repeat_interleave(page_slots, 1) * page_slots + slot_S % page_slots
    address_RS = address_RS.masked_fill(~held_RS, 0)
    position_RS = position_PS.flatten()[address_RS].long().masked_fill(~held_RS, EMPTY)
    position_BHS = position_RS.view(batch, heads, -1)
    mass_RS = None
    if mass_PS is not None:
        observation = Observation(noise=noise, tau=tau, seed=seed)
        sums_BHS = step_sums(weights_BN1S[:, :, 0], position_BHS, seen_B, layer, observation)
        mass_RS = mass_PS.flatten()[address_RS] + sums_BHS.flatten(0, 1)
        mass_PS.view(-1)[address_RS[held_RS]] = mass_RS[held_RS]

    over_R = counts_R > quota_R
    if evict:
        mass_BHS = None if mass_RS is None else mass_RS.view(position_BHS.shape)
        score_BHS = ranking(rank, position_BHS, mass_BHS, seen_B)
        guarded_BHS = protect(position_BHS, seen_B, sink, recent_B)
        victim_R = drop_one(score_BHS, position_BHS, guarded_BHS).flatten()
        to, source = place(victim_R), place(counts_R - 1)
        move_R = over_R & (~guarded_BHS & (position_BHS != EMPTY)).flatten(0, 1).any(-1)
        for pool in (value_PSE, position_PS, mass_PS):
            if pool is not None:
                pool[to[0][move_R], to[1][move_R]] = pool[source[0][move_R], source[1][move_R]]
        moved_RD = key_PDS[source[0][move_R], :, source[1][move_R]]
        key_PDS[to[0][move_R], :, to[1][move_R]] = moved_RD
        counts_R -= move_R.to(counts_R.dtype)
    return out_BN1E


def check(
    query_BN1D: Tensor,
    key_BH1D: Tensor,
    value_BH1E: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
    quota_R: Tensor,
    recent_B: Tensor,
) -> None:
    """Raises OperatorError for tensors that do not fit together."""
    op = "decode_step"
    floats = {"query_BN1D": query_BN1D, "key_BH1D": key_BH1D, "value_BH1E": value_BH1E}
    pools = {"key_PDS": key_PDS, "value_PSE": value_PSE}
    words = {"position_PS": position_PS, "table_RW": table_RW}
    longs = {"counts_R": counts_R, "seen_B": seen_B, "quota_R": quota_R, "recent_B": recent_B}
    masses = {} if mass_PS is None else {"mass_PS": mass_PS}
    lengths = shapes.bind(op, {**floats, **pools, **words, **longs, **masses})
    shapes.floating(op, {**floats, **pools})
    shapes.of_dtype(op, key_PDS.dtype, pools)
    shapes.of_dtype(op, torch.int32, words)
    shapes.of_dtype(op, torch.int64, longs)
    shapes.of_dtype(op, torch.float32, masses)
    if lengths["H"] * lengths["B"] != lengths["R"]:
        shapes.refuse(op, f"table_RW has {lengths['R']} rows; B·H = {lengths['B'] * lengths['H']}")
    shapes.paged(op, lengths, table_RW, counts_R, appended=1)
    written = {*pools, *masses, "position_PS", "counts_R"}
    shapes.apart(op, {**floats, **pools, **words, **longs, **masses}, written)


def refuse_old(old: Sequence[Tensor]) -> None:
    """Raises OperatorError for parts of old slots."""
    if old:
        shapes.refuse("decode_step", "old slots are for the C++ kernels; use decode_rows here")


def check_choices(
    rank: str, noise: str, tau: float, scaling: float, softcap: float, massless: bool
) -> None:
    """Raises OperatorError for options outside their range."""
    op = "decode_step"
    if rank not in RANKS:
        shapes.refuse(op, f"rank={rank!r} is unknown; allowed: {', '.join(RANKS)}")
    if massless and rank != "position":
        shapes.refuse(op, f"rank={rank!r} needs mass_PS")
    check_noise(op, noise, tau)
    shapes.logits(op, scaling, softcap)


def check_noise(op: str, noise: str, tau: float) -> None:
    """Raises OperatorError for options outside their range."""
    if noise not in ("none", "frozen", "fresh"):
        shapes.refuse(op, f"noise={noise!r} is unknown; allowed: none, frozen, fresh")
    shapes.temperature(op, tau)
