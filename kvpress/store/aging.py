"""When slots become old: a page at a time, once `residual` later ones are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import KEY, POSITION, VALUE, Survivors
from kvpress.store.compaction import compact
from kvpress.store.decided import Decided, kept_of
from kvpress.store.packed import PackedRows
from kvpress.store.packing import pack
from kvpress.store.paged import PagedRows
from kvpress.store.rows import Layouts, by_position


class PageAging:
    """Recent slots of one layer, and parts of old ones: one for each format.

    Args: recent: the store of recent slots. page: slots of an old page. residual: last slots that
    stay as they came. ordered: nothing is ever dropped.
    """

    def __init__(self, recent: PagedRows, page: int, residual: int, ordered: bool) -> None:
        self._recent, self._page, self._residual, self._ordered = recent, page, residual, ordered
        self.parts: list[PackedRows] = []  # none until something is decided
        self.decided = Decided(recent.sequences, recent.heads, recent.device)
        self.room = 0  # tokens that surely come before a slot becomes old

    @property
    def recent(self) -> PagedRows:
        """The slots that are not old."""
        return self._recent

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
        return int(self.decided.wide_R.sum())

    @property
    def decided_B(self) -> Tensor:
        """For which sequences it is decided how old slots are stored: bool, on the host."""
        return self.decided.decided_B

    def due(self) -> list[int]:
        """Sequences with rows of which at least a page has become old."""
        if self.room > 0:
            return []
        most = self._residual + self._page
        counts_BH = self.recent.counts_BH
        self.room = most - int(counts_BH.max()) if counts_BH.numel() else most
        return (counts_BH >= most).any(1).nonzero().flatten().tolist()

    def before_old(self, sequence: int) -> int:
        """At least so many tokens come to a sequence before one of its slots becomes old."""
        return self._residual + self._page - int(self.recent.counts_BH[sequence].max())

    def decide(
        self,
        sequences: Sequence[int],
        layouts: Sequence[PageLayout],
        key_channels_bHC: Tensor,
        value_channels_bHU: Tensor,
        wide_bH: Tensor,
    ) -> None:
        """Settles how old slots of some sequences are stored, for as long as they are here.

        layouts: the second one, if there is one, is for rows that are kept wide. wide_bH: these,
        bool, on the host.
        """
        recent = self.recent
        if not self.parts:
            volatile = {n: column for n, column in recent.columns.items() if column.volatile}
            like = recent.paging.pages(KEY).new_empty(0)
            sizes = (recent.sequences, recent.heads)
            self.decided.make_room(layouts[0])
            self.parts = [
                PackedRows(*sizes, layout, volatile, like, self._ordered) for layout in layouts
            ]
        row_R = recent.paging.table.row_index(sequences)
        self.decided.settle(sequences, row_R, key_channels_bHC, value_channels_bHU, wide_bH)
        _share_channels(self.decided, self.parts)

    # Recent slots become old, and old ones recent

    def pack_old(self, sequences: Sequence[int]) -> None:
        """Packs what has become old of some sequences, whole pages, the first tokens first."""
        columns = self.recent.dense_by_position(sequences)
        row_r = self.recent.paging.table.row_index(sequences)
        count_r = self.recent.counts[row_r]
        pages_r = (count_r - self._residual).clamp_min(0) // self._page
        self._add_pages(columns, row_r, count_r, pages_r)
        left_r = count_r - pages_r * self._page
        self._leave_last(columns, tuple(sequences), left_r, self.recent.page_slots)
        self.room = 0

    def _add_pages(
        self, columns: Mapping[str, Tensor], row_r: Tensor, count_r: Tensor, pages_r: Tensor
    ) -> None:
        """Packs the first pages of some rows, which hold so many slots."""
        device, size = self.recent.device, self._page
        # One entry for each new page: the number of its row among these, and, since entries of a
        # row are neighbours, which of its pages it is. Dense rows end together: they start at S −
        # count.
        from_A = host.arange(len(row_r)).repeat_interleave(pages_r)
        page_A = host.arange(len(from_A)) - torch.searchsorted(from_A, from_A)
        first_A = columns[POSITION].shape[2] - count_r[from_A] + page_A * size
        slot_AS = first_A[:, None] + host.arange(size)
        for number, part in enumerate(self.parts):
            mine_A = self.decided.wide_R[row_r[from_A]] == bool(number)
            if bool(mine_A.any()):
                own_A, slots = from_A[mine_A], slot_AS[mine_A].to(device)
                at = (own_A.to(device)[:, None], slots)
                old = {name: column.flatten(0, 1)[at] for name, column in columns.items()}
                channels = part.channels(row_r[own_A])
                page_AX = pack(part.layout, old.pop(KEY), old.pop(VALUE), channels)
                part.add(row_r[own_A], page_AX, old)
            compact(part)

    def _leave_last(
        self,
        columns: Mapping[str, Tensor],
        sequences: tuple[int, ...],
        left_r: Tensor,
        headroom: int,
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
        self.recent.fill([survivors], headroom)

    def unpack_last(self, missing_R: Tensor) -> None:
        """Makes at least so many old slots of each row recent ones."""
        recent = self.recent
        columns = {name: recent.dense(name) for name in recent.columns}
        counts_R = recent.counts.clone()
        for number, part in enumerate(self.parts):
            mine_R = self.decided.wide_R == bool(number)
            taken_R, taken = part.take_last(missing_R * mine_R)
            counts_R += taken_R
            slot_S = host.arange(taken[POSITION].shape[2])
            beyond_BHS = self._by_sequence(slot_S >= taken_R[:, None])
            taken[POSITION] = taken[POSITION].masked_fill(beyond_BHS.to(recent.device), -1)
            columns = {n: torch.cat([taken[n].to(x.dtype), x], dim=2) for n, x in columns.items()}
        everybody = tuple(range(recent.sequences))
        self._leave_last(by_position(columns), everybody, counts_R, 0)

    def _by_sequence(self, rows: Tensor) -> Tensor:
        """What belongs to rows, `[R, ...]`, as `[B, H, ...]`."""
        heads = self.recent.heads
        return rows.view(len(rows) // heads, heads, *rows.shape[1:])

    # Whole sequences

    def select(self, index: Sequence[int]) -> PageAging:
        """One whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        recent = self.recent.select_sequences(index)
        chosen = PageAging(recent, self._page, self._residual, self._ordered)
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
            wide_BH = self._by_sequence(state["wide"])
            self.decide(range(self.recent.sequences), ours, key_BHC, value_BHU, wide_BH)
        self.decided.decided_B = state["decided"].clone()

    def check_integrity(self) -> None:
        """Raises CacheError unless every part holds rows of its format only."""
        for number, part in enumerate(self.parts):
            if bool((part.counts[self.decided.wide_R != bool(number)] > 0).any()):
                raise CacheError(f"Rows hold old slots in format {number}, which is not theirs.")
        if any(bool(part.counts[~self.decided.decided_R].any()) for part in self.parts):
            raise CacheError("A sequence holds old slots, but it was not decided how.")


def _share_channels(decided: Decided, parts: Sequence[PackedRows]) -> None:
    for part in parts:
        part.key_channels_RC = decided.key_channels_RC
        part.value_channels_RU = decided.value_channels_RU
