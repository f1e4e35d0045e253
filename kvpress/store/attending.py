"""How rows with old slots are attended to: at once, or part by part (streamed.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_layout import span
from kvpress.ops import Choice, Logits, Old
from kvpress.ops.operands import new
from kvpress.store.aging import PageAging, dense_widths, recent_slots, slot_bytes
from kvpress.store.chosen import Chosen, Looked, Wanted, beside, spread
from kvpress.store.found import Found, Retrieving
from kvpress.store.joint import JointMemory
from kvpress.store.packed import PackedRows
from kvpress.store.paged import PagedRows
from kvpress.store.retrieving import attend_some
from kvpress.store.tiers.data_file import DataFile
from kvpress.store.trees import Trees

Named: TypeAlias = Mapping[str, PackedRows | PagedRows]  # what is in pages, as files name it


class Attending(Retrieving, Protocol):
    """What depends on whether all slots of some rows are on the device."""

    streams: bool  # whether some may have to be read before they are attended to

    def memory(self) -> JointMemory:
        """What all pages cost."""

    def old(self, sequences: Sequence[int] | None) -> Old:
        """Parts of old slots, as operators take them."""

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Rows.attend`."""

    def attend_prompt(
        self,
        query_bNQD: Tensor,
        own: tuple[Tensor, Tensor],
        sequences: Sequence[int],
        logits: Logits,
    ) -> tuple[Tensor, Tensor]:
        """See `Rows.attend_prompt`."""

    def saved(
        self, state: dict[str, Tensor], named: Named, data: DataFile | None
    ) -> dict[str, Tensor]:
        """See `Rows.saved`. state: what the rows gave."""


Attends: TypeAlias = Callable[[PageAging], Attending]


class Resident:
    """All slots are on the device: one operator call attends to them."""

    streams = False

    def __init__(self, aging: PageAging) -> None:
        self._aging, self.trees = aging, Trees()

    def memory(self) -> JointMemory:
        """What all pages cost."""
        return JointMemory(self._aging, self.trees)

    def old(self, sequences: Sequence[int] | None) -> Old:
        """Parts of old slots, as operators take them."""
        parts = self._aging.filled
        tensors = [tensor for part in parts for tensor in part.part(sequences)]
        return Old(tensors, [size for part in parts for size in part.layout])

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and LSE of new queries, and weights in the order of `dense` where asked for."""
        pages = self._aging.recent.paging.operands(sequences)
        out_bNQE, lse_bNQ, weights = ops.decode_rows(
            query_bNQD, pages, logits, need_weights, self.old(sequences)
        )
        if not need_weights:
            return out_bNQE, lse_bNQ, None
        # The operator leaves room for every page of the table; dense forms end with the last slot.
        kept, start = [], 0
        for part in self._aging.filled:
            (slots,) = dense_widths(self._aging, sequences, [part])
            kept.append(weights[..., start : start + slots])
            start += span(part.layout, part.paging.table.pages_RW.shape[1])
        return out_bNQE, lse_bNQ, torch.cat([*kept, weights[..., start:]], dim=-1)

    def attend_some(self, wanted: Wanted) -> tuple[Tensor, Tensor | None, Found]:
        """Attention output over some of the pages, by a shorter page table of each row."""
        wanted = self.trees.allowed(wanted, self._aging.filled)
        if wanted.at_once:
            return self._attend_at_once(wanted)
        query_bN1D, sequences, logits = wanted.query_bN1D, wanted.sequences, wanted.logits
        pages = self._aging.recent.paging.operands(sequences)

        def attend(some: Sequence[Chosen], weighs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
            some = [own.narrow() for own in some]
            tensors = [tensor for own in some for tensor in _part_of(own, sequences)]
            old = Old(tensors, [size for own in some for size in own.part.layout])
            out_bN1E, lse_bN1, weights = ops.decode_rows(query_bN1D, pages, logits, weighs, old)
            if weighs:
                widths = dense_widths(self._aging, sequences, [own.part for own in some])
                spans = [span(own.part.layout, own.place_rW.shape[1]) for own in some]
                weights = spread(weights, some, widths, spans)
            return out_bN1E, lse_bN1[..., 0], weights if weighs else None

        return attend_some(self._aging, wanted, attend, self.trees)

    def foresee(self, wanted: Wanted) -> list[tuple[Any, Tensor]]:
        """Nothing: all of it is here."""
        return []

    def _attend_at_once(self, wanted: Wanted) -> tuple[Tensor, None, Found]:
        """The same in one call, where nothing is to be decided between its parts."""
        aging, sequences, parts = self._aging, wanted.sequences, self._aging.filled
        choice = (wanted.sink, wanted.recent, wanted.cells, wanted.candidates or 0)
        *found, place_rW, chosen_Xr, judged_Xr = ops.decode_chosen(
            wanted.query_bN1D,
            aging.recent.paging.operands(sequences),
            wanted.logits,
            self.old(sequences),
            [tensor for part in parts for tensor in beside(part)],
            wanted.seen_b,
            wanted.slots,
            new(Choice, choice),
        )
        rows, chosen, looked = len(wanted.slots), [], []
        widths = [part.paging.table.pages_RW.shape[1] for part in parts]
        for number, own_rW in enumerate(torch.split(place_rW, widths, 1)):
            chosen.append(Chosen(parts[number], number, own_rW, chosen_Xr[number]))
            judged_r = judged_Xr[number] if wanted.cells else None
            looked.append(Looked.at(parts[number], rows, own_rW.numel(), judged_r))
        out_bN1E, lse_bN, mass_bN, length_r = found
        recent, each = recent_slots(aging, sequences), slot_bytes(aging)
        read = Found(out_bN1E, lse_bN, mass_bN, length_r, recent, each, chosen, looked)
        return out_bN1E, None, read

    def attend_prompt(
        self,
        query_bNQD: Tensor,
        own: tuple[Tensor, Tensor],
        sequences: Sequence[int],
        logits: Logits,
    ) -> tuple[Tensor, Tensor]:
        """Not here: prompts attend to dense copies of what is on the device."""
        raise NotImplementedError("rows that do not stream are attended to in their dense form")

    def saved(
        self, state: dict[str, Tensor], named: Named, data: DataFile | None
    ) -> dict[str, Tensor]:
        """The state: a file holds all of it."""
        return state


def _part_of(own: Chosen, sequences: Sequence[int] | None) -> list[Tensor]:
    """A part of which rows have the chosen pages alone, as operators take it."""
    tensors = own.part.part(sequences)
    table_rW = tensors[3].gather(1, own.place_rW.long().clamp_min(0))
    dropped_r = tensors[7].new_empty(0)  # it is counted over all pages
    return [*tensors[:3], table_rW, own.pages_r * own.part.layout.slots, *tensors[5:7], dropped_r]
