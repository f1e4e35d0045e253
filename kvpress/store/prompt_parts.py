"""Attention of a prompt chunk over old slots that are read group of units by group of units.

The groups are always the same, whatever the caps: only how much of one is read at once differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import ops
from kvpress.formulas.running import RunningAttention
from kvpress.store.base import POSITION
from kvpress.store.tiered import TieredPages
from kvpress.store.units import Units
from kvpress.types import EMPTY

_GROUP = 2  # units of slots that are attended to at once


class Group(NamedTuple):
    """Keys and values of some units of one sequence, dense, and which of the slots are empty."""

    sequence: int
    key_HSD: Tensor
    value_HSE: Tensor
    hidden_H1S: Tensor


def groups(units: Units) -> Iterator[Group]:
    """The old slots of all sequences, by groups of units. Raises TierError."""
    rows, (heads, pages) = units.rows, units.id_uHW.shape[1:]
    chosen, lists, at_once = [], [], rows.shelf.at_once
    key_u = units.unit_u // _GROUP * (int(units.sequence_u.max()) + 1) + units.sequence_u
    for key in torch.unique(key_u).tolist():
        mine_u = (key_u == key).nonzero().flatten()
        parts = torch.split(mine_u, max(1, at_once // (heads * pages)))
        chosen += [(part, i == len(parts) - 1) for i, part in enumerate(parts)]
        lists += [units.id_uHW[part][units.held_uHW[part]] for part in parts]
    dense = _Dense(rows, heads, pages)
    for (part_u, last), at_A in zip(chosen, rows.shelf.stream(lists), strict=True):
        dense.add(units, part_u, at_A)
        if last:
            yield dense.take(int(units.sequence_u[part_u[0]]))


class _Dense:
    """A group that is put together from what is read at once."""

    def __init__(self, rows: TieredPages, heads: int, pages: int) -> None:
        self._rows, self._heads, self._pages = rows, heads, pages
        layout = rows.layout
        shape = (heads, _GROUP * pages, layout.slots)
        self._key_HWSD = rows.like.new_zeros(*shape, layout.key_width)
        self._value_HWSE = rows.like.new_zeros(*shape, layout.value_width)
        self._hidden_HWS = torch.ones(shape, dtype=torch.bool, device=rows.like.device)

    def add(self, units: Units, part_u: Tensor, at_A: Tensor) -> None:
        """Unpacks the pages of some units, which are at these places of the device."""
        rows, held_uHW = self._rows, units.held_uHW[part_u]
        u_A, head_A, page_A = held_uHW.nonzero().unbind(1)
        place_A = units.unit_u[part_u][u_A] % _GROUP * self._pages + page_A
        channel_A = (part_u[u_A] * self._heads + head_A).to(rows.like.device)
        channels = units.key_channels_XC[channel_A], units.value_channels_XU[channel_A]
        packed_AX = rows.shelf.pages[at_A.to(rows.like.device)]
        key_ASD, value_ASE = ops.unpack(packed_AX, *channels, list(rows.layout), rows.like)
        at = (head_A.to(rows.like.device), place_A.to(rows.like.device))
        self._key_HWSD[at], self._value_HWSE[at] = key_ASD, value_ASE
        self._hidden_HWS[at] = False
        if POSITION in rows.paging.columns:
            pages = units.page_uHW[part_u][held_uHW].to(rows.like.device)
            self._hidden_HWS[at] = rows.paging.pages(POSITION)[pages] == EMPTY

    def take(self, sequence: int) -> Group:
        """The group, and begins another one."""
        made = (self._key_HWSD, self._value_HWSE)
        key_HSD, value_HSE = (x.flatten(1, 2).clone() for x in made)
        hidden_H1S = self._hidden_HWS.flatten(1, 2)[:, None].clone()
        self._hidden_HWS.fill_(True)
        return Group(sequence, key_HSD, value_HSE, hidden_H1S)


def prompt_parts(
    every: list[Units],
    recent: tuple[Tensor, Tensor, Tensor],
    query_bNQD: Tensor,
    own: tuple[Tensor, Tensor],
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Output `[b, N, Q, E]` and LSE of new tokens over old slots, recent ones and themselves.

    recent: keys, values and positions of recent slots, dense `[b, H, S, ...]`. own: keys and values
    of the new tokens.
    """
    key_bHQD, value_bHQE = own
    heads, width = key_bHQD.shape[1], value_bHQE.shape[3]
    running = [RunningAttention(x, heads, width, scaling, softcap) for x in query_bNQD]
    for units in every:
        if len(units.unit_u):
            for group in groups(units):
                running[group.sequence].add(group.key_HSD, group.value_HSE, group.hidden_H1S)
    for i, one in enumerate(running):
        key_bHSD, value_bHSE, position_bHS = recent
        if position_bHS.shape[2]:
            one.add(key_bHSD[i], value_bHSE[i], (position_bHS[i] == EMPTY)[:, None])
        one.add_own(key_bHQD[i], value_bHQE[i])
    out_bNQE = torch.stack([one.output() for one in running]).to(query_bNQD.dtype)
    return out_bNQE, torch.stack([one.lse() for one in running])
