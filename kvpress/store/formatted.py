"""Rows with an old part, packed in few channels and bits, and a recent part as tokens came.

A slot becomes old a page at a time, once `residual` later ones are there. Dense columns hold the
slots of each part in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout, span
from kvpress.store.base import KEY, POSITION, VALUE, Survivors
from kvpress.store.packed import PackedRows
from kvpress.store.packing import pack
from kvpress.store.paged import PagedRows
from kvpress.store.rows import Aging, Layouts, Rows, by_position
from kvpress.store.saved import expect


class FormattedRows(Rows):
    """The slots of one layer, `sequences × heads` rows.

    Args: recent: the store of recent slots. page: slots of an old page. residual: last slots that
    stay as they came. ordered: nothing is ever dropped.
    """

    refills = False  # old slots are never written again

    def __init__(self, recent: PagedRows, page: int, residual: int, ordered: bool) -> None:
        self.recent, self.page, self.residual, self.ordered = recent, page, residual, ordered
        self.sequences, self.heads, self.page_slots = (
            recent.sequences,
            recent.heads,
            recent.page_slots,
        )
        self.device, self.on_host, self.columns = recent.device, recent.on_host, recent.columns
        self.parts: list[PackedRows] = []
        nothing = torch.empty(0, 0, dtype=torch.int16, device=recent.device)
        self.key_channels_RT = self.value_channels_RU = nothing  # until that is decided
        self.wide_R = host.zeros(len(recent.counts), dtype=torch.bool)  # on the host
        self.decided_B = host.zeros(recent.sequences, dtype=torch.bool)  # on the host
        self._room = 0  # tokens that surely come before a slot becomes old

    # What both parts have

    @property
    def counts(self) -> Tensor:  # type: ignore[override]
        """Slots of every row that hold a token: int64 `[R]`, on the host."""
        return sum((part.held for part in self.parts), self.recent.counts)

    @property
    def counts_BH(self) -> Tensor:
        """The same as `[B, H]`."""
        return self.counts.view(self.sequences, self.heads)

    @property
    def aging(self) -> Aging:  # type: ignore[override]
        """How slots become old."""
        return self

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
        return int(self.wide_R.sum())

    @property
    def rewritten(self) -> list[str]:
        """The columns of slots that are written anew where others are dropped."""
        if not bool(self.counts.any()):
            return list(self.columns)
        return [n for n, column in self.columns.items() if n == POSITION or column.volatile]

    def limit(self, pages: int) -> None:
        """Nothing: recent slots are few, and old ones come in whole pages."""

    @property
    def _stores(self) -> list[PagedRows]:
        return [*self.parts, self.recent]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive: pages of both kinds, tables, counts and channels."""
        own = (self.key_channels_RT, self.value_channels_RU, self.wide_R, self.decided_B)
        books = sum(tensor.nbytes for tensor in own)
        return books + sum(store.nbytes for store in self._stores)

    @property
    def room(self) -> int:
        """Slots of the pages that these rows keep alive, empty ones and holes included."""
        return sum(store.room for store in self._stores)

    @property
    def nbytes_shared(self) -> int:
        """Bytes of the pages that rows of other stores use as well."""
        return sum(store.nbytes_shared for store in self._stores)

    @property
    def shares(self) -> bool:
        """Whether some page of these rows has other users."""
        return any(store.shares for store in self._stores)

    @property
    @contextmanager
    def lock(self) -> Iterator[None]:
        """To be held while the pages are used: forks may run in several threads."""
        with ExitStack() as stack:
            for store in self._stores:  # always in this order
                stack.enter_context(store.lock)
            yield

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the store keeps alive."""
        yield from (self.key_channels_RT, self.value_channels_RU, self.wide_R, self.decided_B)
        for store in self._stores:
            yield from store.tensors()

    def row_index(self, sequences: Sequence[int]) -> Tensor:
        """The rows of some sequences: int64, on the host."""
        return self.recent.row_index(sequences)

    def page_bytes(self) -> int:
        """Bytes of a page of recent slots."""
        return self.recent.page_bytes()

    def row_bytes(self) -> int:
        """Bytes of a row besides its pages."""
        return sum(store.row_bytes() for store in self._stores)

    # Attention

    def pool(self, name: str) -> Tensor:
        """The pages of one column of the recent slots."""
        return self.recent.pool(name)

    def operands(self, sequences: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Page table and counts of the recent slots."""
        return self.recent.operands(sequences)

    def old(self) -> tuple[list[Tensor], list[int]]:
        """Parts of old slots, as operators take them."""
        tensors = [tensor for part in self.parts for tensor in part.part()]
        return tensors, [size for part in self.parts for size in part.layout]

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        scaling: float,
        softcap: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output of new queries, and weights in the order of `dense` where asked for."""
        old, layouts = self.old()
        if sequences is not None:
            rows = self.row_index(sequences).to(self.device)
            per_row = (1, 2, 3, 4, 7)  # channels, table, counts, dropped
            old = [x[rows] if i % 8 in per_row else x for i, x in enumerate(old)]
        out_bNQE, _, weights = ops.decode_rows(
            query_bNQD,
            *(self.pool(name) for name in (KEY, VALUE)),
            *self.operands(sequences),
            scaling,
            softcap,
            need_weights,
            old=old,
            layouts=layouts,
        )
        if not need_weights:
            return out_bNQE, None
        kept, start = [], 0
        for part, slots in zip(self.parts, self._widths(sequences), strict=False):
            kept.append(weights[..., start : start + slots])
            start += span(part.layout, part.operands()[0].shape[1])
        return out_bNQE, torch.cat([*kept, weights[..., start:]], dim=-1)

    def _widths(self, sequences: Sequence[int] | None) -> list[int]:
        """Dense slots of each part."""
        rows = slice(None) if sequences is None else self.row_index(sequences)
        return [int(part.counts[rows].max()) for part in self.parts]

    # Slots

    def reserve_one(self) -> None:
        """Makes room for one more slot in every row."""
        self.recent.reserve_one()

    def count_step(self, quota_R: Tensor | None, everywhere: bool) -> None:
        """Counts what the operator `decode_step` did: it changed the counts of all parts itself."""
        self.recent.count_step(None, False)
        self._room -= 1

    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1."""
        return torch.cat([store.dense(name, sequences) for store in self._stores], dim=2)

    def dense_by_position(self, sequences: Sequence[int]) -> dict[str, Tensor]:
        """All columns of some sequences, dense: each row by position, its empty slots first."""
        return by_position({name: self.dense(name, sequences) for name in self.columns})

    def append(self, columns: Mapping[str, Tensor], sequences: Sequence[int] | None = None) -> None:
        """Adds T tokens to every row of some sequences: each column `[b, H, T, ...]`."""
        self.recent.append(columns, sequences)
        self._room -= columns[POSITION].shape[2]

    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites a volatile column of all slots from the form that `dense` gives it."""
        start = 0
        for part, slots in zip(self.parts, self._widths(sequences), strict=True):
            part.write(name, values_bHS[:, :, start : start + slots], sequences)
            start += slots
        self.recent.write(name, values_bHS[:, :, start:], sequences)

    def evict_one(
        self, row_N: Tensor, slot_N: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Drops one slot of each of some rows, by its place in the dense form of some sequences."""
        slot_N = slot_N.cpu()
        for part, slots in zip(self.parts, self._widths(sequences), strict=True):
            mine_N = (slot_N >= 0) & (slot_N < slots)
            if bool(mine_N.any()):
                part.evict_one(row_N[mine_N], slot_N[mine_N])
            slot_N = torch.where(mine_N, -1, slot_N - slots)
        mine_N = slot_N >= 0
        if bool(mine_N.any()):
            self.recent.evict_one(row_N[mine_N], slot_N[mine_N].to(self.device))

    def retain(self, survivors: Survivors) -> None:
        """Drops what did not survive of some sequences; their volatile columns are renewed."""
        for store in self._stores:
            store.retain(survivors)

    def fill(self, groups: Sequence[Survivors], headroom: int = 0) -> None:
        """Replaces what some sequences hold, which must have no old slots."""
        listed = [b for group in groups for b in group.sequences]
        if any(bool(part.counts[self.row_index(listed)].any()) for part in self.parts):
            raise CacheError("Rows with packed slots cannot be filled anew; retain what stays.")
        self.recent.fill(groups, headroom)
        self._room = 0

    # Formats

    def due(self) -> list[int]:
        """Sequences with rows of which at least a page has become old."""
        if self._room > 0:
            return []
        most = self.residual + self.page
        counts_BH = self.recent.counts_BH
        self._room = most - int(counts_BH.max()) if counts_BH.numel() else most
        return (counts_BH >= most).any(1).nonzero().flatten().tolist()

    def before_old(self, sequence: int) -> int:
        """At least so many tokens come to a sequence before one of its slots becomes old."""
        return self.residual + self.page - int(self.recent.counts_BH[sequence].max())

    def decide(
        self,
        sequences: Sequence[int],
        layouts: Sequence[PageLayout],
        key_channels_bHT: Tensor,
        value_channels_bHU: Tensor,
        wide_bH: Tensor,
    ) -> None:
        """Settles how old slots of some sequences are stored, for as long as they are here.

        layouts: the second one, if there is one, is for rows that are kept wide. wide_bH: these,
        bool, on the host.
        """
        if not self.parts:
            every = len(self.wide_R)
            volatile = {n: column for n, column in self.columns.items() if column.volatile}
            like = self.recent.pool(KEY).new_empty(0)
            first = layouts[0]
            channels = torch.zeros(every, first.key_kept, dtype=torch.int16, device=self.device)
            self.key_channels_RT = channels
            self.value_channels_RU = channels.new_zeros(every, first.value_kept)
            sizes = (self.sequences, self.heads)
            self.parts = [
                PackedRows(*sizes, layout, volatile, like, self.ordered) for layout in layouts
            ]
        rows = self.row_index(sequences)
        on_device = rows.to(self.device)
        self.key_channels_RT[on_device] = key_channels_bHT.flatten(0, 1).to(torch.int16)
        self.value_channels_RU[on_device] = value_channels_bHU.flatten(0, 1).to(torch.int16)
        self.wide_R[rows] = wide_bH.flatten()
        self.decided_B[list(sequences)] = True
        self._share_channels()

    def pack_old(self, sequences: Sequence[int]) -> None:
        """Packs what has become old of some sequences, whole pages, the first tokens first."""
        columns = self.recent.dense_by_position(sequences)
        rows, size = self.row_index(sequences), self.page
        held = columns[POSITION].shape[2]
        count_r = self.recent.counts[rows]
        pages_r = (count_r - self.residual).clamp_min(0) // size
        row_N = host.arange(len(rows)).repeat_interleave(pages_r)
        page_N = host.arange(len(row_N)) - torch.searchsorted(row_N, row_N)
        first_N = held - count_r[row_N] + page_N * size
        slot_NS = first_N[:, None] + host.arange(size)
        flat = {name: column.flatten(0, 1) for name, column in columns.items()}
        for number, part in enumerate(self.parts):
            mine_N = self.wide_R[rows[row_N]] == bool(number)
            if bool(mine_N.any()):
                own_N, slots = row_N[mine_N], slot_NS[mine_N].to(self.device)
                at = (own_N.to(self.device)[:, None], slots)
                old = {name: column[at] for name, column in flat.items()}
                channels = part.channels(rows[own_N])
                page_NX = pack(part.layout, old.pop(KEY), old.pop(VALUE), channels)
                part.add(rows[own_N], page_NX, old)
            part.compact()
        left_r = count_r - pages_r * size
        most = int(left_r.max())
        slot_rS = (held - left_r[:, None] + host.arange(most)).clamp_max(held - 1)
        at = (torch.arange(len(rows), device=self.device)[:, None], slot_rS.to(self.device))
        kept = {n: self._by_sequence(column[at]) for n, column in flat.items()}
        survivors = Survivors(tuple(sequences), kept, left_r.view(-1, self.heads))
        self.recent.fill([survivors], self.page_slots)
        self._room = 0

    def _share_channels(self) -> None:
        for part in self.parts:
            part.key_channels_RT = self.key_channels_RT
            part.value_channels_RU = self.value_channels_RU

    # What happens to whole sequences

    def select_sequences(self, index: Sequence[int]) -> FormattedRows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages."""
        chosen, rows = copy.copy(self), self.row_index(index)
        chosen.recent, chosen.sequences = self.recent.select_sequences(index), len(index)
        chosen.parts = [part.select_sequences(index) for part in self.parts]
        chosen.wide_R, chosen.decided_B = self.wide_R[rows], self.decided_B[list(index)]
        if self.parts:
            on_device = rows.to(self.device)
            chosen.key_channels_RT = self.key_channels_RT[on_device]
            chosen.value_channels_RU = self.value_channels_RU[on_device]
            chosen._share_channels()
        return chosen

    def unshare(self, headroom: int = 0) -> None:
        """Gives every row pages of its own."""
        for part in self.parts:
            part.own()
        self.recent.unshare(self.page_slots)

    def truncate(self, tokens: int) -> None:
        """Drops the last `tokens` slots of every row; what is left of an old page is unpacked."""
        missing_R = (tokens - self.recent.counts).clamp_min(0)
        if bool((missing_R > 0).any()):
            self._unpack_last(missing_R)
        self.recent.truncate(tokens)
        self._room = 0

    def _unpack_last(self, missing_R: Tensor) -> None:
        """Makes at least so many old slots of each row recent ones."""
        columns = {name: self.recent.dense(name) for name in self.columns}
        counts_R = self.recent.counts.clone()
        for number, part in enumerate(self.parts):
            taken_R, taken = part.take_last(missing_R * (self.wide_R == bool(number)))
            counts_R += taken_R
            slot_S = host.arange(taken[POSITION].shape[2])
            beyond = (slot_S >= taken_R[:, None]).view(*self.counts_BH.shape, -1)
            taken[POSITION] = taken[POSITION].masked_fill(beyond.to(self.device), -1)
            columns = {n: torch.cat([taken[n].to(x.dtype), x], dim=2) for n, x in columns.items()}
        ordered = by_position(columns)
        most, held = int(counts_R.max()), ordered[POSITION].shape[2]
        start_R = held - counts_R
        slot_RS = (start_R[:, None] + host.arange(most)).clamp_max(held - 1).to(self.device)
        row_R1 = torch.arange(len(counts_R), device=self.device)[:, None]
        kept = {n: self._by_sequence(x.flatten(0, 1)[row_R1, slot_RS]) for n, x in ordered.items()}
        everybody = tuple(range(self.sequences))
        self.recent.fill([Survivors(everybody, kept, counts_R.view(-1, self.heads))])

    def trim(self) -> None:
        """Gives memory back if much of the pools is unused."""
        for store in self._stores:
            store.trim()

    def pages_of_sequences(self) -> list[list[int]]:
        """The counts and pages of all rows of each sequence; equal ones hold the same slots."""
        lists = [store.pages_of_sequences() for store in self._stores]
        return [[x for part in parts for x in part] for parts in zip(*lists, strict=True)]

    def check_integrity(self) -> bool:
        """True if every part is whole, and holds rows of its format only. Raises CacheError."""
        for number, part in enumerate(self.parts):
            if bool((part.counts[self.wide_R != bool(number)] > 0).any()):
                raise CacheError(f"Rows hold old slots in format {number}, which is not theirs.")
        undecided_R = ~self.decided_B.repeat_interleave(self.heads)
        if any(bool(part.counts[undecided_R].any()) for part in self.parts):
            raise CacheError("A sequence holds old slots, but it was not decided how.")
        return all(store.check_integrity() for store in self._stores)

    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold: tensors on the host."""
        state = {"wide": self.wide_R.clone(), "decided": self.decided_B.clone()}
        state |= {"key_channels": self.key_channels_RT.cpu().clone()}
        state |= {"value_channels": self.value_channels_RU.cpu().clone()}
        for name, store in self._named.items():
            state |= {f"{name}.{key}": tensor for key, tensor in store.state().items()}
        return state

    def load(self, state: Mapping[str, Tensor], layouts: Layouts) -> None:
        """Takes over what `state` gave. Raises CacheError if it cannot."""
        own = {name: x for name, x in state.items() if "." not in name}
        kept = [_width(own.get(f"{name}_channels")) for name in ("key", "value")]
        ours = layouts((kept[0], kept[1]))
        self._check_books(own, ours)
        channels = (own["key_channels"], own["value_channels"])
        if len(channels[0]):
            key_BHT, value_BHU = (self._by_sequence(x).to(self.device) for x in channels)
            wide_BH = self._by_sequence(own["wide"])
            self.decide(range(self.sequences), ours, key_BHT, value_BHU, wide_BH)
        self.decided_B = own["decided"].clone()
        odd = {name.split(".")[0] for name in state.keys() - own.keys()} - self._named.keys()
        if odd:
            raise CacheError(f"{', '.join(sorted(odd))}: nothing that belongs here.")
        for name, store in self._named.items():
            prefix = f"{name}."
            store.load(
                {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
            )
        self._room = 0

    def _check_books(self, own: Mapping[str, Tensor], layouts: Sequence[PageLayout]) -> None:
        """Raises CacheError unless these can say how old slots are stored."""
        every, layout = len(self.wide_R), layouts[0]
        known = any(x.numel() for name, x in own.items() if name.endswith("_channels"))
        sizes = ((every, layout.key_kept), (every, layout.value_kept)) if known else ((0, 0),) * 2
        expect(
            own,
            {
                "wide": (torch.bool, (every,)),
                "decided": (torch.bool, (self.sequences,)),
                "key_channels": (torch.int16, sizes[0]),
                "value_channels": (torch.int16, sizes[1]),
            },
        )
        decided_R = own["decided"].repeat_interleave(self.heads)
        if bool((own["wide"] & ~(decided_R & (len(layouts) > 1))).any()):
            raise CacheError("Rows keep more bits, but nothing decided that.")
        if bool(decided_R.any()) and not known:
            raise CacheError("It was decided how old slots are stored, but not in which channels.")
        for name, width in (("key", layout.key_width), ("value", layout.value_width)):
            kept_RT = own[f"{name}_channels"]
            kept_RT = kept_RT[decided_R].int() if known else kept_RT
            inside = (kept_RT >= 0) & (kept_RT < width)
            if not bool(inside.all()) or not bool((kept_RT.diff(dim=1) > 0).all()):
                raise CacheError(
                    f"The channels of {name}s are not ascending numbers below {width}."
                )

    def _by_sequence(self, rows: Tensor) -> Tensor:
        """What belongs to rows, `[R, ...]`, as `[B, H, ...]`."""
        return rows.view(len(rows) // self.heads, self.heads, *rows.shape[1:])

    @property
    def _named(self) -> dict[str, PagedRows]:
        return {"recent": self.recent, **{f"old{i}": part for i, part in enumerate(self.parts)}}


def _width(channels: Tensor | None) -> int:
    """How many channels rows keep; 0: that is not decided."""
    return channels.shape[1] if channels is not None and channels.dim() == 2 else 0
