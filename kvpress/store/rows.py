"""What a layer's store promises, whatever its slots look like in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.formulas.ranking import gather
from kvpress.ops import Logits, Old
from kvpress.store.base import Column, Survivors, by_position
from kvpress.store.found import Retrieving
from kvpress.store.paging import Paging
from kvpress.store.tiers.data_file import DataFile

# The layouts of old pages that keep so many channels of keys and values.
Layouts: TypeAlias = Callable[[tuple[int, int]], Sequence[PageLayout]]


class Aging(Protocol):
    """How slots become old: a page at a time they leave the recent ones and are packed.

    How a sequence is packed is decided once, before its first slot becomes old.
    """

    @property
    def decided_B(self) -> Tensor:
        """For which sequences it is decided how old slots are stored: bool, on the host."""

    @property
    def recent(self) -> Rows:
        """The slots that are not old."""

    @property
    def kept(self) -> tuple[int, int] | None:
        """How many channels of keys and values old slots keep; None: nothing was decided."""

    @property
    def kept_channels(self) -> list[int]:
        """Channels of keys in every format, then those of values."""

    @property
    def wide_rows(self) -> int:
        """Rows whose old slots a guard keeps at more bits."""

    room: int  # tokens that surely come before `due` names a sequence, unless one has ended

    def due(self, first_B: Tensor, ended: Sequence[int] = ()) -> list[int]:
        """Sequences with rows of which at least a page has become old.

        first_B: tokens that come to a sequence before it is decided how it is stored. ended: those
        that have read a prompt, of which a part of a page may be enough.
        """

    def before_old(self, sequence: int) -> int:
        """At least so many tokens come to a sequence before a page of it is old."""

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

    def to_pack(self, sequence: int, format_H: Tensor, ended: bool) -> Tensor:
        """How many slots of each row would be packed in these formats: int64 `[H]`, on the host."""

    def pack_old(self, sequences: Sequence[int], ended: Sequence[int] = ()) -> None:
        """Packs what has become old of some sequences, whole pages, the first tokens first.

        ended: those that have read a prompt: their last page need not be full.
        """


class Memory(Protocol):
    """What the pages of some rows cost, and who else uses them."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """To be held while the pages are used: forks may run in several threads."""

    @property
    def shares(self) -> bool:
        """Whether some page of these rows has other users."""

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive."""

    @property
    def nbytes_shared(self) -> int:
        """Bytes of the pages that rows of other stores (forks) use as well."""

    @property
    def room(self) -> int:
        """Slots of the pages that these rows keep alive, empty ones included."""

    def row_bytes(self) -> int:
        """Bytes that a row costs besides its pages: its counters."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is kept alive."""

    def trim(self) -> None:
        """Gives memory back if much of it is unused."""

    def pages_of_sequences(self) -> list[list[int]]:
        """The counts and pages of all rows of each sequence; equal ones hold the same slots."""


class Rows(ABC):
    """The slots of one layer: `sequences × heads` ragged rows, row r = b·H + h.

    The order of slots inside a row is free. Dense forms are `[b, H, S, ...]`: S is the largest
    count, empty slots hold position -1.
    """

    sequences: int
    heads: int
    device: torch.device
    on_host: bool  # whether that is the CPU
    page_slots: int  # slots of a page
    columns: dict[str, Column]  # the fields of a slot
    paging: Paging  # the pages that new tokens go to
    memory: Memory  # what all pages cost, and who else uses them
    aging: Aging | None = None  # how slots become old; None: all of them stay as they came
    streams: bool = False  # whether slots may have to be read before they are attended to
    retrieving: Retrieving | None = None  # how a decode step reads some pages; None: it reads all

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """Slots of every row that hold a token: int64 `[R]`, on the host."""

    @property
    def counts_BH(self) -> Tensor:
        """The same as `[B, H]`."""
        return self.counts.view(self.sequences, self.heads)

    @property
    def refills(self) -> bool:
        """Whether `fill` may write survivors anew; otherwise `retain` leaves them."""
        return True

    @property
    def rewritten(self) -> list[str]:
        """The columns of slots that are written anew where others are dropped."""
        return list(self.columns)

    @abstractmethod
    def limit(self, pages: int) -> None:
        """Says that rows at their quotas never need more pages."""

    def old(self) -> Old:
        """Parts of old slots, as operators take them: none, where all slots are alike."""
        return _NO_OLD

    @abstractmethod
    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and LSE of new queries, and weights in the order of `dense` where asked for."""

    def attend_prompt(
        self,
        query_bNQD: Tensor,
        own: tuple[Tensor, Tensor],
        sequences: Sequence[int],
        logits: Logits,
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE of new tokens over all slots and themselves: of rows that stream.

        own: keys and values of the new tokens, which are not stored yet.
        """
        raise NotImplementedError("rows that do not stream are attended to in their dense form")

    @abstractmethod
    def count_step(self, quota_R: Tensor | None, everywhere: bool) -> None:
        """Counts what the operator `decode_step` did to the counts on the device.

        One token came to every row; rows above `quota_R` lost one slot. everywhere: all rows did.
        """

    @abstractmethod
    def dense(self, name: str, sequences: Sequence[int] | None = None) -> Tensor:
        """A dense copy of one column, `[b, H, S, ...]`; empty slots hold position -1."""

    def picked(self, name: str, sequences: Sequence[int], index_bHK: Tensor) -> Tensor:
        """Some slots of one column, `[b, H, K, ...]`, by their places in the dense form."""
        return gather(self.dense(name, sequences), index_bHK)

    def dense_by_position(self, sequences: Sequence[int]) -> dict[str, Tensor]:
        """All columns of some sequences, dense: each row by position, its empty slots first."""
        return by_position({name: self.dense(name, sequences) for name in self.columns})

    @abstractmethod
    def append(self, columns: Mapping[str, Tensor], sequences: Sequence[int] | None = None) -> None:
        """Adds T tokens to every row of some sequences: each column `[b, H, T, ...]`.

        Columns that are not given start at zero.
        """

    @abstractmethod
    def write(self, name: str, values_bHS: Tensor, sequences: Sequence[int] | None = None) -> None:
        """Overwrites a volatile column of all slots from the form that `dense` gives it."""

    @abstractmethod
    def evict_one(
        self, row_A: Tensor, slot_A: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Drops one slot (int64, on the device) of each of some rows (int64, on the host).

        sequences: whose dense form the slots are places in. Raises CacheError for an empty row.
        """

    @abstractmethod
    def retain(self, survivors: Survivors) -> None:
        """Drops what did not survive of some sequences; pages that lose nothing stay shared.

        Survivors are known by their positions; their volatile columns are renewed.
        """

    @abstractmethod
    def fill(self, groups: Sequence[Survivors], headroom: int = 0) -> None:
        """Replaces what some sequences hold, in exactly the pages that all rows then need.

        Sequences that stand in no group keep what they hold; none may stand in two. Every row gets
        room for `headroom` more slots.
        """

    @abstractmethod
    def truncate(self, tokens: int) -> None:
        """Drops the last `tokens` slots of every row, and its pages that are then empty."""

    @abstractmethod
    def select_sequences(self, index: Sequence[int]) -> Rows:
        """A store whose sequence i holds what sequence `index[i]` holds, in the same pages.

        This one stays as it is: both copy a page before they write to it.
        """

    @abstractmethod
    def unshare(self, headroom: int = 0) -> None:
        """Gives every row pages of its own, side by side as after a prompt."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that the rows hold: tensors on the host."""

    def saved(self, data: DataFile | None) -> dict[str, Tensor]:
        """What a file must hold: `state`, but pages of tiers, which are written to a data file.

        Raises TierError, OSError.
        """
        return self.state()

    @abstractmethod
    def load(self, state: Mapping[str, Tensor], layouts: Layouts) -> None:
        """Takes over what `state` gave, into rows that hold nothing.

        layouts: asked if some slots are packed. Raises CacheError if that cannot be.
        """

    @abstractmethod
    def check_integrity(self) -> bool:
        """True if no page is lost or shared by rows that cannot share it, and every row fits.

        Raises CacheError otherwise.
        """


_NO_OLD = Old([], [])
