"""Rows whose old slots are attended to part by part, since not all of them are on the device.

A part is a span of the pages of one row (tiered.py). What a query sees in a part depends on nothing
else, and parts are joined in one order by their LSE: so the output is the same, to the last bit,
wherever pages are and however many are read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain, zip_longest
from time import perf_counter
from typing import Any

from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_layout import PageLayout
from kvpress.host import lasting
from kvpress.ops import Logits, Old
from kvpress.store.aging import PageAging, dense_widths
from kvpress.store.attending import Named
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.store.chosen import Chosen, Wanted, spread
from kvpress.store.foreseen import likely
from kvpress.store.formatted import FormattedRows
from kvpress.store.found import Found
from kvpress.store.joint import JointMemory
from kvpress.store.packed import PackedRows
from kvpress.store.paged import PagedRows
from kvpress.store.parts import Parts, Plan
from kvpress.store.picked import Picked, moved, named, old_of, pick
from kvpress.store.prompt_parts import prompt_parts
from kvpress.store.retrieving import attend_some
from kvpress.store.session import save_pages
from kvpress.store.spans import SPAN
from kvpress.store.tiered import TieredPages
from kvpress.store.tiered_memory import TieredMemory
from kvpress.store.tiers.data_file import DataFile
from kvpress.store.tiers.tiers import TIERS, Tiers
from kvpress.store.trees import Trees
from kvpress.store.units import unit_bytes, units_of


def tiered_rows(
    recent: PagedRows,
    layouts: Sequence[PageLayout],
    residual: int,
    ordered: bool,
    tiers: Tiers,
    layer: int,
    together: int = SPAN,
    cells: int | None = None,
) -> FormattedRows:
    """Rows whose slots are in whole pages, in any tier, once they are old.

    Args: as FormattedRows. tiers: where pages are. layer: its number. together: slots that become
    old at once while tokens are decoded.
    """
    part = partial(_part, tiers, layer, unit_bytes(recent.heads, layouts))
    attends = partial(Streamed, tiers=tiers, layer=layer)
    return FormattedRows(recent, layouts, residual, ordered, part, together, attends, cells)


class Streamed:
    """Attention over slots of which some must be read first.

    Args: aging: the slots. tiers: where their pages are. layer: its number.
    """

    streams = True

    def __init__(self, aging: PageAging, tiers: Tiers, layer: int) -> None:
        self.aging, self.tiers, self._layer = aging, tiers, layer
        self.device = aging.recent.device
        self.trees = Trees()
        self._known: tuple[list[object], Plan] | None = None
        self._beside: int | None = None  # bytes, as they were counted last
        tiers.readers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.tiers.readers.add(self)

    def memory(self) -> StreamedMemory:
        """What all pages cost."""
        return StreamedMemory(self.aging, self.trees, self.tiers)

    def old(self, sequences: Sequence[int] | None) -> Old:
        """Not here: no operator takes what may not be there."""
        raise NotImplementedError("old slots that stream are attended to part by part")

    def attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and LSE of new queries, and weights in the order of `dense` where asked for.

        Raises TierError where a page cannot be read.
        """
        self._beside = None
        plan = self._plan(sequences)
        out_bNQE, parts = self._attend(query_bNQD, sequences, logits, need_weights, plan)
        if not need_weights:
            return out_bNQE, parts.lse_bNQ, None
        weights = parts.weights(dense_widths(self.aging, sequences, self.aging.parts))
        return out_bNQE, parts.lse_bNQ, weights

    def _attend(
        self,
        query_bNQD: Tensor,
        sequences: Sequence[int] | None,
        logits: Logits,
        need_weights: bool,
        plan: Plan,
    ) -> tuple[Tensor, Parts]:
        begun = perf_counter()
        pages = self.aging.recent.paging.operands(sequences)
        parts = Parts(plan, query_bNQD, pages, logits, need_weights)
        self.tiers.uses.device += plan.pages_here
        if plan.is_one:
            parts.add_all()
        else:
            self.tiers.passed(self)
            parts.add_each(chain(plan.here(), plan.streamed()))
            self.tiers.read_ahead(self)
        out_bNQE = parts.joined()
        if self.tiers.watcher is not None:
            self.tiers.watcher.note("attention", begun, layer=self._layer)
        return out_bNQE, parts

    def _at_once(
        self, query_bNQD: Tensor, sequences: Sequence[int] | None, logits: Logits, old: Old
    ) -> tuple[Tensor, Tensor]:
        """Attention output, and LSE, where one operator call takes all old slots."""
        begun = perf_counter()
        pages = self.aging.recent.paging.operands(sequences)
        found = ops.attend_parts(query_bNQD, pages, logits, False, old)
        out_bNQE, lse_bNQ = ops.join_parts(*found[:2])
        if self.tiers.watcher is not None:
            self.tiers.watcher.note("attention", begun, layer=self._layer)
        return out_bNQE.to(query_bNQD.dtype), lse_bNQ

    def attend_some(self, wanted: Wanted) -> tuple[Tensor, Tensor | None, Found]:
        """Attention output over some of the pages, of which some may have to be read.

        Raises TierError where a page cannot be read.
        """
        query_bN1D, sequences, logits = wanted.query_bN1D, wanted.sequences, wanted.logits
        self._beside = None  # a token has come to these rows
        picks = list[list[Picked]]()

        def attend(some: Sequence[Chosen], weighs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
            some = [x.narrow() for x in some]
            picked = pick(some, sequences)
            picks.append(picked)
            old = None if weighs else old_of(picked)
            if old is not None:
                self.tiers.passed(self)
                if len(picked) == 1:  # several may have pages in both halves of the staging
                    self.tiers.read_ahead(self)
                self.tiers.uses.device += sum(x.brought.here for x in picked)
                out_bN1E, lse_bN1 = self._at_once(query_bN1D, sequences, logits, old)
                return out_bN1E, lse_bN1[..., 0], None
            every, at = [x.units() for x in picked], [x.at_P for x in picked]
            plan = Plan(every, len(query_bN1D), self.aging.recent.heads, self.device, at)
            self.tiers.uses.device -= sum(x.brought.copied for x in picked)
            out_bN1E, parts = self._attend(query_bN1D, sequences, logits, weighs, plan)
            if not weighs:
                return out_bN1E, parts.lse_bNQ[..., 0], None
            spans = [x.place_rW.shape[1] * x.part.layout.slots for x in some]
            widths = dense_widths(self.aging, sequences, [x.part for x in some])
            weights = spread(parts.weights(spans), some, widths, spans)
            return out_bN1E, parts.lse_bNQ[..., 0], weights

        wanted = self.trees.allowed(wanted, self.aging.filled)
        out, weights, found = attend_some(self.aging, wanted, attend, self.trees)
        self._beside = None  # and some of theirs may be packed before others choose
        return out, weights, found.having(moved(picks))

    def foresee(self, wanted: Wanted) -> list[tuple[TieredPages, Tensor]]:
        """The pages that a step will most likely choose whose queries are not known yet."""
        return named(likely(self.aging, wanted), wanted.sequences)

    def attend_prompt(
        self,
        query_bNQD: Tensor,
        own: tuple[Tensor, Tensor],
        sequences: Sequence[int],
        logits: Logits,
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE of new tokens over all slots and their own.

        Old slots pass by group by group. Raises TierError where a page cannot be read.
        """
        recent, self._beside = self.aging.recent, None
        key, value, position = (recent.dense(x, sequences) for x in (KEY, VALUE, POSITION))
        every = [units_of(part, sequences) for part in self._tiered]
        return prompt_parts(every, (key, value, position), query_bNQD, own, *logits)

    def saved(
        self, state: dict[str, Tensor], named: Named, data: DataFile | None
    ) -> dict[str, Tensor]:
        """The state without pages, which are written to a data file. Raises TierError, OSError."""
        assert data is not None, "pages of tiers are not kept in memory"
        for name, part in named.items():
            if isinstance(part, TieredPages):
                names = [n for n in state if n.startswith(f"{name}.")]
                own = {n.removeprefix(f"{name}."): state.pop(n) for n in names}
                save_pages(part, own, data)
                state |= {f"{name}.{n}": tensor for n, tensor in own.items()}
        return state

    def read_ahead(self) -> None:
        """Starts to read what will be attended to first, if it is what was attended to last."""
        if len(foreseen := [x.steps for x in self._tiered if x.steps.foreseen]) == 1:
            foreseen[0].stage()
        elif self._known is not None and self._plan(None) is self._known[1]:
            self._known[1].begin()

    def _plan(self, sequences: Sequence[int] | None) -> Plan:
        """What is attended to, made anew where pages came, went or moved."""
        if sequences is None and self._known is not None:
            seen = iter(self._known[0])
            known = (x for part in self.aging.parts for x in _state_of(part))
            if all(a is b for a, b in zip_longest(known, seen)):
                return self._known[1]
        return self._planned(sequences)

    @lasting
    def _planned(self, sequences: Sequence[int] | None) -> Plan:
        known = [x for part in self.aging.parts for x in _state_of(part)]
        recent = self.aging.recent
        batch = recent.sequences if sequences is None else len(sequences)
        every = [units_of(part, sequences) for part in self._tiered]
        plan = Plan(every, batch, recent.heads, self.device)
        self._known = (known, plan) if sequences is None else self._known
        return plan

    def bytes_beside(self, anew: bool) -> int:
        """Bytes on the device besides pages of old slots: recent slots, positions, boxes, trees.

        anew: also where no step of these rows was since they were counted.
        """
        if not anew and self._beside is not None:
            return self._beside
        beside = self.aging.recent.memory.nbytes + self.trees.nbytes
        for part in self.aging.parts:
            if isinstance(part.memory, TieredMemory):
                beside += part.memory.beside
        self._beside = None if anew else beside  # room is made anew while rows change
        return beside

    @property
    def _tiered(self) -> list[TieredPages]:
        return [part for part in self.aging.parts if isinstance(part, TieredPages)]


class StreamedMemory(JointMemory):
    """The memory of recent and old slots, whose pages are in tiers that other rows have too."""

    def __init__(self, aging: PageAging, trees: Trees, tiers: Tiers) -> None:
        super().__init__(aging, trees)
        self._tiers = tiers

    @property
    def lock(self) -> AbstractContextManager[None]:
        """That of all rows of the engine first: they share what is on its way."""
        return self._both(super().lock)

    @contextmanager
    def _both(self, inner: AbstractContextManager[None]) -> Iterator[None]:
        with self._tiers.lock, inner:
            yield

    def tier_bytes(self) -> dict[str, int]:
        """Bytes of pages in each tier."""
        found = [x.tier_bytes() for x in self._all if isinstance(x, TieredMemory)]
        return {tier: sum(x[tier] for x in found) for tier in TIERS}


def _state_of(rows: PackedRows) -> tuple[object, ...]:
    """What is another object when the pages of rows are others, or elsewhere."""
    if not isinstance(rows, TieredPages):
        return ()
    return (rows.paging.table.pages_RW, rows.counts, rows.shelf.directory.version)


def _part(
    tiers: Tiers, layer: int, unit: int, number: int, *made_of: Any, cells: int | None = None
) -> TieredPages:
    """Rows of old slots of a layout, by its number and what PackedRows is made of."""
    return TieredPages(*made_of, tiers=tiers, name=(layer, number), unit=unit, cells=cells)
