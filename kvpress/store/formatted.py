"""Rows with an old part, packed in few channels and bits, and a recent part as tokens came.

Dense columns hold the slots of each old part in turn, then the recent ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Logits, Old
from kvpress.store.aging import MakePart, PageAging, dense_widths, resident, stores_of
from kvpress.store.attending import Attending, Attends, Resident
from kvpress.store.base import POSITION, Survivors
from kvpress.store.division import Division
from kvpress.store.packed import PackedRows
from kvpress.store.paged import PagedRows
from kvpress.store.rows import Layouts, Rows
from kvpress.store.tiers.data_file import DataFile


class FormattedRows(Rows):
    """Rows whose slots are packed once they are old.

    Args: recent: the store of recent slots. layouts: of old pages of all channels, one for each
    format. residual: last slots that stay as they came, at most. ordered: nothing is ever dropped.
    part: makes the rows of old slots of one format. together: slots that are packed at once, if
    they are more than a page. attends: makes how they are attended to. cells: bits of the
    cells of keys, by which steps choose pages; None: they read all.
    """

    aging: PageAging
    attending: Attending

    def __init__(
        self,
        recent: PagedRows,
        layouts: Sequence[PageLayout],
        residual: int,
        ordered: bool,
        part: MakePart = resident,
        together: int = 1,
        attends: Attends = Resident,
        cells: int | None = None,
    ) -> None:
        self.cells = cells
        part = part if cells is None else partial(part, cells=cells)
        self.heads, self.page_slots, self.columns = recent.heads, recent.page_slots, recent.columns
        self.device, self.on_host = recent.device, recent.on_host
        self.sequences, self.paging = recent.sequences, recent.paging
        division = Division.of(layouts, residual, recent.columns, ordered, together)
        self.aging, self.attends = PageAging(recent, division, ordered, part), attends
        _begin(self)

    @property
    def counts(self) -> Tensor:
        """Slots of every row that hold a token: int64 `[R]`, on the host."""
        return sum((part.held for part in self.aging.parts), self.aging.recent.counts)

    @property
    def refills(self) -> bool:
        """Whether no slot is old yet: those are never written again."""
        return not any(bool(part.counts.any()) for part in self.aging.parts)

    @property
    def rewritten(self) -> list[str]:
        """The columns of slots that are written anew where others are dropped."""
        if self.refills:
            return list(self.columns)
        return [n for n, column in self.columns.items() if n == POSITION or column.volatile]

    def limit(self, pages: int) -> None:
        """Nothing: recent slots are few, and old ones come in whole pages."""

    # Attention

    def old(self) -> Old:
        """Parts of old slots, as operators take them."""
        return self.attending.old(None)

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and LSE of new queries, and weights in the order of `dense` where asked for."""
        return self.attending.attend(query_bNQD, sequences, logits, need_weights)

    def attend_prompt(
        self,
        query_bNQD: Tensor,
        own: tuple[Tensor, Tensor],
        sequences: Sequence[int],
        logits: Logits,
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE of new tokens over all slots and themselves: of rows that stream."""
        return self.attending.attend_prompt(query_bNQD, own, sequences, logits)

    # Slots

    def count_step(self, quota_R: Tensor | None, everywhere: bool) -> None:
        """Counts what the operator `decode_step` did: it changed the counts of all parts itself."""
        self.paging.table.count_step(None, False)
        self.aging.room -= 1

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1."""
        return torch.cat([store.dense(name, sequences) for store in stores_of(self.aging)], dim=2)

    def picked(self, name: str, sequences: Sequence[int], index_bHK: Tensor) -> Tensor:
        """Some slots of one column, `[b, H, K, ...]`, by places; only recent ones are cheap."""
        recent = self.aging.recent
        if recent.counts_BH[list(sequences)].equal(self.counts_BH[list(sequences)]):
            return recent.picked(name, sequences, index_bHK)
        return super().picked(name, sequences, index_bHK)

    def append(self, columns: Mapping[str, Tensor], sequences: Sequence[int] | None = None) -> None:
        """Adds T tokens to every row of some sequences: each column `[b, H, T, ...]`."""
        self.aging.recent.append(columns, sequences)
        self.aging.room -= columns[POSITION].shape[2]

    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites a volatile column of all slots from the form that `dense` gives it."""
        start = 0
        parts = self.aging.parts
        for part, slots in zip(parts, dense_widths(self.aging, sequences, parts), strict=True):
            part.fields.write(name, values_bHS[:, :, start : start + slots], sequences)
            start += slots
        self.aging.recent.write(name, values_bHS[:, :, start:], sequences)

    def evict_one(
        self, row_A: Tensor, slot_A: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Drops one slot of each of some rows, by its place in the dense form of some sequences."""
        slot_A, parts = slot_A.cpu(), self.aging.parts
        for part, slots in zip(parts, dense_widths(self.aging, sequences, parts), strict=True):
            mine_A = (slot_A >= 0) & (slot_A < slots)
            if bool(mine_A.any()):
                part.evict_one(row_A[mine_A], slot_A[mine_A])
            # From here on places count from the end of this part; -1: that slot was found.
            slot_A = torch.where(mine_A, -1, slot_A - slots)
        mine_A = slot_A >= 0
        if bool(mine_A.any()):
            self.aging.recent.evict_one(row_A[mine_A], slot_A[mine_A].to(self.device))

    def retain(self, survivors: Survivors) -> None:
        """Drops what did not survive of some sequences; their volatile columns are renewed."""
        for store in stores_of(self.aging):
            store.retain(survivors)
        self.aging.room = 0  # of shorter rows fewer slots stay as they came

    def fill(self, groups: Sequence[Survivors], headroom: int = 0) -> None:
        """Replaces what some sequences hold. Raises CacheError if they have old slots."""
        rows = self.paging.table.row_index([b for group in groups for b in group.sequences])
        if any(bool(part.counts[rows].any()) for part in self.aging.parts):
            raise CacheError("Rows with packed slots cannot be filled anew; retain what stays.")
        self.aging.recent.fill(groups, headroom)
        self.aging.room = 0

    def truncate(self, tokens: int) -> None:
        """Drops the last `tokens` slots of every row; what is left of an old page is unpacked."""
        missing_R = (tokens - self.aging.recent.counts).clamp_min(0)
        if bool((missing_R > 0).any()):
            self.aging.unpack_last(missing_R)
        self.aging.recent.truncate(tokens)
        self.aging.room = 0

    # What happens to whole sequences

    def select_sequences(self, index: Sequence[int]) -> FormattedRows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        chosen = copy.copy(self)
        chosen.aging, chosen.sequences = self.aging.select(index), len(index)
        chosen.paging = chosen.aging.recent.paging
        _begin(chosen)
        return chosen

    def unshare(self, headroom: int = 0) -> None:
        """Gives every row pages of its own."""
        for part in self.aging.parts:
            part.unshare()
        self.aging.recent.unshare(headroom)

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold: tensors on the host."""
        state = self.aging.decided.state()
        for name, part in self._named().items():
            state |= {f"{name}.{key}": tensor for key, tensor in part.state().items()}
        return state

    def saved(self, data: DataFile | None) -> dict[str, Tensor]:
        """What a file must hold: `state`, but pages of tiers, which are written to a data file."""
        return self.attending.saved(self.state(), self._named(), data)

    def load(self, state: Mapping[str, Tensor], layouts: Layouts) -> None:
        """Takes over what `state` gave. Raises CacheError if it cannot."""
        own = {name: x for name, x in state.items() if "." not in name}
        self.aging.load(own, layouts)
        named = self._named()
        odd = {name.split(".")[0] for name in state.keys() - own.keys()} - named.keys()
        if odd:
            raise CacheError(f"{', '.join(sorted(odd))}: nothing that belongs here.")
        for name, part in named.items():
            prefix = f"{name}."
            part.load({n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)})
        self.aging.room = 0

    def _named(self) -> dict[str, PackedRows | PagedRows]:
        """What is in pages, as the names of a state start."""
        old = {f"old{i}": part for i, part in enumerate(self.aging.parts)}
        return {"recent": self.aging.recent, **old}

    def check_integrity(self) -> bool:
        """True if every part is whole, and holds rows of its format only. Raises CacheError."""
        self.aging.check_integrity()
        return all(store.check_integrity() for store in stores_of(self.aging))


def _begin(rows: FormattedRows) -> None:
    """Makes what follows from the slots."""
    rows.attending = rows.attends(rows.aging)
    rows.memory, rows.streams = rows.attending.memory(), rows.attending.streams
    rows.retrieving = None if rows.cells is None else rows.attending
