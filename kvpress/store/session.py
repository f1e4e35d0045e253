"""Rows whose pages are in tiers, as a session: tables in the manifest, pages in the data file.

Instead of its bytes the manifest has of every page where it is: the number of a record in a table,
and its place in there. A record of whole spans is the one that the tiers have; what is not in one
yet is sealed into records of the same form, pages of open spans one to a slice. A page is written
once, whatever number of rows has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.base import POSITION, REF
from kvpress.store.fields import Fields
from kvpress.store.paging import Paging
from kvpress.store.saved import ANY, expect
from kvpress.store.session_table import DIGEST, FIXED, entries_of, table
from kvpress.store.spans import Whole, whole_spans
from kvpress.store.tiered_memory import Used
from kvpress.store.tiers.data_file import DataFile, Source
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.record import Entry, Owner, Record
from kvpress.store.tiers.shelf import Shelf
from kvpress.types import EMPTY

_TOGETHER = 64  # pages of open spans in a record
_SEVERAL = -1  # instead of a sequence: pages of open spans of any
_PAGES = ("page.record", "page.place")  # of every page
_SESSION = "session"


class TieredPages(Protocol):
    """Rows of old slots whose pages are in tiers: see tiered.py."""

    name: tuple[int, int]  # layer and part
    span: int  # pages
    layout: PageLayout
    like: Tensor
    shelf: Shelf
    paging: Paging
    fields: Fields

    @property
    def counts(self) -> Tensor:
        """Slots of every row."""

    def ids_in_use(self) -> Tensor:
        """See `Tenant`."""

    def spill(self, least: int) -> None:
        """See `Tenant`."""

    def thin(self, least: int) -> None:
        """See `Tenant`."""

    def used(self) -> Used:
        """The pages with slots."""

    def seal(
        self, group: Whole, id_NP: Tensor, page_AX: Tensor, position_AS: Tensor | None
    ) -> None:
        """Makes a record of a span."""

    def positions(self, page_A: Tensor) -> Tensor | None:
        """The positions of pages, where they are kept."""


class Named(NamedTuple):
    """Who has which page: every entry of a table with slots, as it was saved."""

    row_A: Tensor
    place_A: Tensor  # in the row
    page_A: Tensor  # among the pages saved


def slices_of(count: int, page_AX: Tensor, position_AS: Tensor | None) -> tuple[Tensor, int]:
    """So many slices of pages with what belongs to them, and their first position."""
    slice_NX = page_AX.view(count, -1)
    if position_AS is None:
        return slice_NX, EMPTY
    position_NS = position_AS.to(torch.int32).view(count, -1)
    slice_NX = torch.cat([slice_NX, position_NS.view(torch.uint8)], dim=1)
    real_S = position_NS[position_NS != EMPTY]
    return slice_NX, int(real_S.min()) if len(real_S) else EMPTY


def _named(counts_R: Tensor, table_RW: Tensor, page_slots: int) -> Named:
    used_RW = host.arange(table_RW.shape[1]) < (counts_R // page_slots)[:, None]
    row_A, place_A = used_RW.nonzero().unbind(1)
    return Named(row_A, place_A, table_RW[row_A, place_A].long())


# Saving


def save_pages(rows: TieredPages, state: dict[str, Tensor], data: DataFile) -> None:
    """Writes the pages of rows to a data file, and says in their `state` where they are.

    Raises TierError, OSError.
    """
    own, id_P = rows.shelf.directory, state.pop(f"page.{REF}")
    named = _named(state["counts"], state["table"], rows.layout.slots)
    order_A = (named.place_A * len(state["counts"]) + named.row_A).argsort()
    row_A, place_A, page_A = (x[order_A] for x in named)
    id_A = id_P[page_A]
    first_A = _firsts(id_A)  # of every page the first row that has it
    record_A = own.record_P[id_A]
    entries: list[Entry] = []
    lower: list[bool] = []  # which records may be in a lower tier: open spans are on the device
    record_I = host.full((len(own.at_P),), NOWHERE)  # by numbers on the shelf
    place_I = host.full((len(own.at_P),), NOWHERE)

    def add(entry: Entry, low: bool, ids: Tensor, places: Tensor) -> None:
        record_I[ids], place_I[ids] = len(entries), places
        entries.append(entry)
        lower.append(low)

    below_A = first_A & (record_A != NOWHERE)
    for number, mine_A in _by_number(record_A, below_A):
        vault = rows.shelf.tiers.vault
        assert vault is not None, "it has the record"
        ids = id_A[mine_A]
        add(data.copy(own.records[number], vault), True, ids, own.place_P[ids])
    position_PS = state.get(f"page.{POSITION}")
    for owner, entry_NP in _groups(rows, row_A, place_A, first_A & ~below_A):
        ids = id_A[entry_NP.flatten()]
        at_A = own.at_P[ids].to(rows.like.device)
        position = None if position_PS is None else position_PS[page_A[entry_NP.flatten()]]
        slices_NX, first = slices_of(len(entry_NP), rows.shelf.pages[at_A].cpu(), position)
        entry = data.seal(slices_NX, Owner(*owner[:4], first, owner.length))
        add(entry, owner.sequence >= 0, ids, host.arange(len(ids)))
    used_P = host.full((len(id_P),), 0, torch.bool)
    used_P[page_A] = True
    for name, found_I in zip(_PAGES, (record_I, place_I), strict=True):
        state[name] = host.full((len(id_P),), NOWHERE)
        state[name][used_P] = found_I[id_P[used_P]]
    state.update(table(entries, lower))
    state[_SESSION] = host.tensor(list(data.id), torch.uint8)


def _firsts(value_A: Tensor) -> Tensor:
    """Which values stand there for the first time: bool."""
    order_A = value_A.argsort(stable=True)
    new_A = torch.ones_like(order_A, dtype=torch.bool)
    new_A[1:] = value_A[order_A].diff() != 0
    return torch.zeros_like(new_A).scatter_(0, order_A, new_A)


def _by_number(number_A: Tensor, wanted_A: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Numbers in the order in which they come, each with all places where it stands."""
    at_A = wanted_A.nonzero().flatten()
    order_A = number_A[at_A].argsort(stable=True)
    numbers, counts = torch.unique_consecutive(number_A[at_A][order_A], return_counts=True)
    parts = torch.split(at_A[order_A], counts.tolist()) if len(at_A) else ()
    yield from sorted(zip(numbers.tolist(), parts, strict=True), key=lambda x: int(x[1][0]))


def _groups(
    rows: TieredPages, row_A: Tensor, place_A: Tensor, wanted_A: Tensor
) -> Iterator[tuple[Owner, Tensor]]:
    """Pages that are on the device only, as records: whose, and which entries are their slices."""
    layer, part = rows.name
    open_A, slots = wanted_A.clone(), rows.layout.slots
    for group in whole_spans(rows.paging.table, rows.span, row_A, place_A, wanted_A):
        open_A[group.entry_NP] = False
        owner = Owner(layer, part, group.sequence, group.heads, EMPTY, rows.span * slots)
        yield owner, group.entry_NP
    heads = rows.paging.table.heads
    for entry_A in torch.split(open_A.nonzero().flatten(), _TOGETHER):
        if len(entry_A):
            own = tuple((row_A[entry_A] % heads).tolist())
            yield Owner(layer, part, _SEVERAL, own, EMPTY, slots), entry_A[:, None]


# Loading


def load_pages(rows: TieredPages, state: Mapping[str, Tensor]) -> None:
    """Takes over what `save_pages` made of a state, from the session that is being loaded.

    Raises CacheError if that cannot be, CacheFileError where a page is not what was saved, and
    TierError where there is no room.
    """
    given, tiers = dict(state), rows.shelf.tiers
    own = {n: given.pop(n) for n in list(given) if n.startswith(("record.", *_PAGES))}
    pages = given["page." + POSITION].shape[0] if "page." + POSITION in given else ANY
    source = tiers.source(given.pop(_SESSION, None))
    expect(
        own,
        {
            **dict.fromkeys(_PAGES, (torch.int64, (pages,))),
            "record.numbers": (torch.int64, (ANY, FIXED + 1)),
            "record.heads": (torch.int64, (ANY,)),
            "record.digest": (torch.uint8, (ANY, DIGEST)),
            "record.slices": (torch.uint8, (ANY, DIGEST)),
        },
    )
    entries = entries_of(own)
    with tiers.lock:
        rows.fields.load({**given, f"page.{REF}": torch.zeros_like(own[_PAGES[0]])})
        named = _named(rows.counts, rows.paging.table.pages_RW, rows.layout.slots)
        record_A, place_A = (own[name][named.page_A] for name in _PAGES)
        _check(rows, source, entries, record_A, place_A, named.row_A)
        lower = own["record.numbers"][:, 2].tolist()
        _enter(rows, source, entries, lower, named, record_A, place_A)


def _check(
    rows: TieredPages,
    source: Source,
    entries: list[Entry],
    record_A: Tensor,
    place_A: Tensor,
    row_A: Tensor,
) -> None:
    """Raises CacheError unless all records lie in the file, and pages in records of their heads."""
    page_bytes, heads = rows.shelf.page_bytes + rows.shelf.beside, rows.paging.table.heads
    sizes = (page_bytes, rows.span * page_bytes)
    for entry in entries:
        size = Record(0, 0, entry.owner, entry.slice_bytes).bytes
        inside = UNIT <= entry.place <= source.bytes - size and entry.place % UNIT == 0
        if entry.slice_bytes not in sizes or not inside or entry.owner[:2] != rows.name:
            raise CacheError(f"{entry[:3]} is no record of these rows in {source.bytes} bytes.")
    if bool(((record_A < 0) | (record_A >= len(entries))).any()):
        raise CacheError(f"Pages are in records that are not among the {len(entries)} there are.")
    if len(torch.unique(record_A)) != len(entries):
        raise CacheError("There are records without a page that is needed.")
    in_slice = host.tensor([entry.slice_bytes // page_bytes for entry in entries] or [1])
    first = host.tensor([0, *(len(entry.owner.heads) for entry in entries)]).cumsum(0)
    head_X = host.tensor([head for entry in entries for head in entry.owner.heads])
    slice_A = place_A // in_slice[record_A]
    odd = (place_A < 0) | (slice_A >= first.diff()[record_A])
    if bool(odd.any()) or not head_X[first[record_A] + slice_A].equal(row_A % heads):
        raise CacheError("Pages are not in the slices of their heads.")


def _enter(
    rows: TieredPages,
    source: Source,
    entries: list[Entry],
    lower: list[int],
    named: Named,
    record_A: Tensor,
    place_A: Tensor,
) -> None:
    """Gives pages their numbers on the shelf, and their bytes a tier. Raises TierError."""
    shelf = rows.shelf
    key_A = record_A * (int(place_A.max()) + 1 if len(place_A) else 1) + place_A
    first_A = _firsts(key_A)
    keys, which_A = torch.unique(key_A, return_inverse=True)
    id_A = shelf.directory.enter(len(keys))[which_A]
    rows.paging.pages(REF)[named.page_A] = id_A
    mine = dict(_by_number(record_A, first_A))
    stay = []
    for number, entry in enumerate(entries):
        low = lower[number] == 1
        if source.lazy and low:
            stay.append(number)
        else:
            at_A = mine[number]
            _settle(rows, entry, source.slices(entry), id_A[at_A], place_A[at_A], low)
    if stay:
        records = shelf.vault.adopt(source, [entries[number] for number in stay])
        for number, record in zip(stay, records, strict=True):
            shelf.directory.seal(id_A[mine[number]], record, place_A[mine[number]])


def _settle(
    rows: TieredPages, entry: Entry, slices_NX: Tensor, id_A: Tensor, place_A: Tensor, low: bool
) -> None:
    """Puts pages of a record on the device, or, if it is full and they may be there, lower."""
    shelf = rows.shelf
    in_slice = entry.slice_bytes // (shelf.page_bytes + shelf.beside)
    room = len(id_A) * shelf.page_bytes
    if low and shelf.tiers.vault is not None and not shelf.tiers.fits(room, shelf.arena):
        return shelf.put_below(id_A, slices_NX, entry.owner, place_A)
    packed_NX = slices_NX[:, : in_slice * shelf.page_bytes]
    packed_NX = packed_NX.reshape(len(slices_NX), in_slice, shelf.page_bytes)
    page_AX = packed_NX[place_A // in_slice, place_A % in_slice]
    shelf.put(id_A, page_AX.to(rows.like.device), rows)
