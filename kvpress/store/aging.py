"""When slots become old: a page at a time, once the slots that stay as they came are behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import KEY, POSITION, VALUE, Survivors, by_position
from kvpress.store.compaction import compact
from kvpress.store.decided import Decided, kept_of
from kvpress.store.division import Division, Held, pages_of
from kvpress.store.packed import PackedRows
from kvpress.store.packing import finite, pack
from kvpress.store.paged import PagedRows
from kvpress.store.rows import Layouts
from kvpress.store.taking import take_last
from kvpress.types import EMPTY

# Makes the rows of old slots of a layout, from its number and what PackedRows is made of.
MakePart: TypeAlias = Callable[..., PackedRows]


def resident(number: int, *made_of: Any, **options: Any) -> PackedRows:
    """Rows of old slots that are all on the device of their layer."""
    return PackedRows(*made_of, **options)


class PageAging:
    """Recent slots of one layer, and parts of old ones: one for each format.

    Args: recent: the store of recent slots. division: the rule by which slots become old. ordered:
    nothing is ever dropped. part: makes the rows of old slots of one format.
    """

    def __init__(
        self, recent: PagedRows, division: Division, ordered: bool, part: MakePart = resident
    ) -> None:
        self._recent, self._division, self._ordered = recent, division, ordered
        self._part = part
        self.parts: list[PackedRows] = []  # none until something is decided
        self.decided = Decided(recent.sequences, recent.heads, recent.device)
        self.room = 0  # tokens that surely come before a slot becomes old

    @property
    def recent(self) -> PagedRows:
        """The slots that are not old."""
        return self._recent

    @property
    def filled(self) -> list[PackedRows]:
        """The parts that have pages: what operators must look at."""
        return [part for part in self.parts if part.paging.pool.pages]

    @property
    def kept(self) -> tuple[int, int] | None:
        """How many channels of keys and values old slots keep; None: nothing was decided."""
        return self.parts[0].layout[3:5] if self.parts else None

    @property
    def kept_channels(self) -> list[int]:
        """Channels of keys in every format, then those of values."""
        layouts = [part.layout for part in self.parts]
        return [x.key_kept for x in layouts] + [x.value_kept for x in layouts]

    @property
    def wide_rows(self) -> int:
        """Rows whose old slots a guard keeps at more bits."""
        bits = [part.layout.key_bits + part.layout.value_bits for part in self.parts]
        return sum(bits[n] > bits[0] for n in self.decided.format_R[self.decided.decided_R])

    @property
    def decided_B(self) -> Tensor:
        """For which sequences it is decided how old slots are stored: bool, on the host."""
        return self.decided.decided_B

    def due(self, first_B: Tensor, ended: Sequence[int] = ()) -> list[int]:
        """Sequences with rows of which at least a page has become old; empty pages are let go.

        first_B: tokens that come to a sequence before it is decided how it is stored. ended: those
        that have read a prompt, of which a part of a page may be enough. Where it is not decided
        yet how a sequence is stored, its pages may turn out to be larger.
        """
        for part in self.parts:
            part.let_go()
        held = self._held(None)
        first_R = first_B.masked_fill(self.decided_B, 0).repeat_interleave(self.recent.heads)
        room_R = self._division.room(held).maximum(first_R)
        self.room = int(room_R.min()) if len(room_R) else self._division.page[0]
        ready_R = room_R == 0
        if ended:
            ready_R |= self._division.packed(held, self._among(ended)) > 0
        return self._by_sequence(ready_R).any(1).nonzero().flatten().tolist()

    def before_old(self, sequence: int) -> int:
        """At least so many tokens come to a sequence before a page of it is old."""
        return int(self._division.room(self._held([sequence])).min())

    def decide(
        self,
        sequences: Sequence[int],
        layouts: Sequence[PageLayout],
        key_channels_bHC: Tensor,
        value_channels_bHU: Tensor,
        format_bH: Tensor,
    ) -> None:
        """Settles how old slots of some sequences are stored, for as long as they are here.

        format_bH: which of the layouts is that of a row: int64, on the host.
        """
        recent = self.recent
        if not self.parts:
            volatile = {n: column for n, column in recent.columns.items() if column.volatile}
            like = recent.paging.pages(KEY).new_empty(0)
            sizes = (recent.sequences, recent.heads)
            self.decided.make_room(layouts[0])
            self.parts = [
                self._part(number, *sizes, layout, volatile, like, self._ordered)
                for number, layout in enumerate(layouts)
            ]
        row_R = recent.paging.table.row_index(sequences)
        self.decided.settle(sequences, row_R, key_channels_bHC, value_channels_bHU, format_bH)
        _share_channels(self.decided, self.parts)

    def to_pack(self, sequence: int, format_H: Tensor, ended: bool) -> Tensor:
        """How many slots of each row would be packed in these formats: int64 `[H]`."""
        held = self._held([sequence], format_H)
        return self._division.packed(held, host.full((len(format_H),), ended, torch.bool))

    # Recent slots become old, and old ones recent

    def pack_old(self, sequences: Sequence[int], ended: Sequence[int] = ()) -> None:
        """Packs what has become old of some sequences, whole pages, the first tokens first.

        ended: those that have read a prompt: their last page need not be full.
        """
        row_r = self.recent.paging.table.row_index(sequences)
        slots_r = self._division.packed(self._held(sequences), self._among(ended)[row_r])
        if bool(slots_r.any()):
            columns = self.recent.dense_by_position(sequences)
            count_r = self.recent.counts[row_r]
            slots_r = slots_r * finite(columns[KEY].flatten(0, 1), columns[VALUE].flatten(0, 1))
            for number, part in enumerate(self.parts):
                mine_r = slots_r * (self.decided.format_R[row_r] == number)
                _add_pages(part, columns, row_r, columns[POSITION].shape[2] - count_r, mine_r)
            self._leave_last(columns, tuple(sequences), count_r - slots_r)
        for part in self.parts:
            compact(part, row_r)
        self.room = 0

    def _leave_last(
        self, columns: Mapping[str, Tensor], sequences: tuple[int, ...], left_r: Tensor
    ) -> None:
        """Leaves only the last slots of some sequences recent, of columns ordered by position."""
        device, held = self.recent.device, columns[POSITION].shape[2]
        slot_S = host.arange(int(left_r.max()))
        # Rows end together: what is left of one starts at `held - left`. Beyond its end anything
        # may stand.
        slot_rS = (held - left_r[:, None] + slot_S).clamp_max(held - 1).to(device)
        at = (torch.arange(len(left_r), device=device)[:, None], slot_rS)
        kept = {name: self._by_sequence(x.flatten(0, 1)[at]) for name, x in columns.items()}
        survivors = Survivors(sequences, kept, left_r.view(-1, self.recent.heads))
        self.recent.fill([survivors])

    def unpack_last(self, missing_R: Tensor) -> None:
        """Makes at least so many old slots of each row recent ones."""
        recent = self.recent
        columns = {name: recent.dense(name) for name in recent.columns}
        counts_R = recent.counts.clone()
        for number, part in enumerate(self.parts):
            taken_R, taken = take_last(part, missing_R * (self.decided.format_R == number))
            counts_R += taken_R
            columns = {n: torch.cat([taken[n].to(x.dtype), x], dim=2) for n, x in columns.items()}
        self._leave_last(by_position(columns), tuple(range(recent.sequences)), counts_R)

    def _by_sequence(self, rows: Tensor) -> Tensor:
        """What belongs to rows, `[R, ...]`, as `[B, H, ...]`."""
        heads = self.recent.heads
        return rows.view(len(rows) // heads, heads, *rows.shape[1:])

    def _among(self, sequences: Sequence[int]) -> Tensor:
        """Which rows are those of some sequences: bool, on the host."""
        among_R = host.zeros(len(self.recent.counts), dtype=torch.bool)
        among_R[self.recent.paging.table.row_index(sequences)] = True
        return among_R

    def _held(self, sequences: Sequence[int] | None, format_R: Tensor | None = None) -> Held:
        """What rows hold; where nothing is decided in the format with the smallest pages."""
        row_R, decided = self.recent.paging.table.row_index(sequences), self.decided
        old, holes = host.zeros(len(row_R)), host.zeros(len(row_R))
        for part in self.parts:
            old, holes = old + part.counts[row_R], holes + part.dropped[row_R]
        least = min(range(len(self._division.page)), key=self._division.page.__getitem__)
        if format_R is None:
            format_R = decided.format_R[row_R].long().where(decided.decided_R[row_R], least)
        return Held(self.recent.counts[row_R], old, holes, format_R)

    # Whole sequences

    def select(self, index: Sequence[int]) -> PageAging:
        """One whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        recent = self.recent.select_sequences(index)
        chosen = PageAging(recent, self._division, self._ordered, self._part)
        chosen.parts = [part.select_sequences(index) for part in self.parts]
        chosen.decided = self.decided.select(index, self.recent.paging.table.row_index(index))
        chosen.room = self.room
        _share_channels(chosen.decided, chosen.parts)
        return chosen

    def load(self, state: Mapping[str, Tensor], layouts: Layouts) -> None:
        """Takes over what was decided, and makes its parts, empty. Raises CacheError."""
        ours = layouts(kept_of(state))
        self.decided.check(state, ours)
        channels = (state["key_channels"], state["value_channels"])
        if len(channels[0]):
            device = self.recent.device
            key_BHC, value_BHU = (self._by_sequence(x).to(device) for x in channels)
            format_BH = self._by_sequence(state["format"])
            self.decide(range(self.recent.sequences), ours, key_BHC, value_BHU, format_BH)
        self.decided.decided_B = state["decided"].clone()

    def check_integrity(self) -> None:
        """Raises CacheError unless every part holds rows of its format only."""
        for number, part in enumerate(self.parts):
            if bool((part.counts[self.decided.format_R != number] > 0).any()):
                raise CacheError(f"Rows hold old slots in format {number}, which is not theirs.")
        if any(bool(part.counts[~self.decided.decided_R].any()) for part in self.parts):
            raise CacheError("A sequence holds old slots, but it was not decided how.")


def _share_channels(decided: Decided, parts: Sequence[PackedRows]) -> None:
    for part in parts:
        part.key_channels_RC = decided.key_channels_RC
        part.value_channels_RU = decided.value_channels_RU


def _add_pages(
    part: PackedRows, columns: Mapping[str, Tensor], row_r: Tensor, first_r: Tensor, slots_r: Tensor
) -> None:
    """Packs so many slots of some rows, from places of dense columns on."""
    own_A, slot_AS, real_AS = pages_of(first_r, slots_r, part.layout.slots)
    if not len(own_A):
        return
    device = columns[POSITION].device
    at = (own_A.to(device)[:, None], slot_AS.to(device))
    old = {name: column.flatten(0, 1)[at] for name, column in columns.items()}
    old[POSITION] = old[POSITION].masked_fill(~real_AS.to(device), EMPTY)
    page_AX = pack(part.layout, old.pop(KEY), old.pop(VALUE), part.channels(row_r[own_A]))
    part.add(row_r[own_A], page_AX, old, (~real_AS).sum(1))


def dense_widths(
    aging: PageAging, sequences: Sequence[int] | None, parts: Sequence[PackedRows]
) -> list[int]:
    """Dense slots of old parts."""
    rows = slice(None) if sequences is None else aging.recent.paging.table.row_index(sequences)
    return [int(part.counts[rows].max()) for part in parts]


def stores_of(aging: PageAging) -> list[PackedRows | PagedRows]:
    """Everything that is in pages: old slots, then recent ones."""
    return [*aging.parts, aging.recent]


def recent_slots(aging: PageAging, sequences: Sequence[int] | None) -> list[int]:
    """Slots of some rows that are in no whole page."""
    counts = aging.recent.counts
    if sequences is not None:
        counts = counts[aging.recent.paging.table.row_index(sequences)]
    slots: list[int] = counts.tolist()
    return slots


def slot_bytes(aging: PageAging) -> int:
    """Bytes of the key and the value of such a slot."""
    return sum(aging.recent.columns[name].page_bytes(1) for name in (KEY, VALUE))
