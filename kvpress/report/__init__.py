"""The ledger as people read it: bytes counted from the storages, slots, seconds of every stage."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from kvpress.report import page
from kvpress.report.figures import Figures
from kvpress.report.figures import LayerReport as LayerReport
from kvpress.report.reads import ReadFigures as ReadFigures
from kvpress.report.tables import Fitted
from kvpress.report.tiers import TierFigures as TierFigures


@dataclass(frozen=True, repr=False)
class Report(Figures):
    """What a cache holds and what it cost. Printed, and shown by a notebook, as a table.

    tokens_seen: real tokens of each sequence, padding excluded. bytes_full: what an uncompressed
    cache of these tokens would hold, in the model's dtype, sliding layers at their window.
    bytes_held: the live storages of keys, values, positions, per-slot state and page tables.
    bytes_shared: the part of them that forks of this cache use as well. bytes_peak: the most that
    was held so far, in a prompt with the new keys and values of the layer at work. Prompt attention
    is computed in full unless a policy makes it sparse: a layer's density is then the share of
    blocks computed. Where decode steps read some pages only, a layer's reads say how much, and what
    they may have missed. bytes_ids: the ids of the tokens seen, 4 bytes each, by which a text that
    does not go on from the cache is refused; bytes_held are without them. bytes_states: what layers
    of linear attention, convolutions and state spaces hold, apart from bytes_held as well; no
    policy compresses it. tiers: see `TierFigures`; where there are some, bytes_held are those of
    all of them.
    """

    def __str__(self) -> str:
        return page.text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return page.page(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Fitted(page.table(self))
        for remark in page.remarks(self):
            yield Text(remark)
