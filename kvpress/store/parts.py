"""Attention over chunks of the slots, some of which must be read first, joined by LSE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import ops
from kvpress.ops import Logits, Old, Pages
from kvpress.store.tiers.arrivals import Arriving
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.units import CHUNK, Units


class Call(NamedTuple):
    """What one operator call takes of old slots: units, as sequences of their own.

    chunk_u, sequence_u: of every unit its first chunk, and whose it is; on the device.
    """

    chunk_u: Tensor
    sequence_u: Tensor
    old: Old
    units: Units


class Plan:
    """The units of some rows and the chunks that they are made of.

    at: where all pages of a layout are, if some are on the device for this step alone. Chunks of
    the first layout come first, then those of the next ones, then those of recent slots.
    """

    def __init__(
        self,
        every: Sequence[Units],
        batch: int,
        heads: int,
        device: torch.device,
        at: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.every, self.batch, self.heads, self._device = every, batch, heads, device
        spans = [int(x.unit_u.max()) + 1 if len(x.unit_u) else 0 for x in every]
        self.chunks = [n * x.chunks for n, x in zip(spans, every, strict=True)]  # of each layout
        self.first = [sum(self.chunks[:i]) for i in range(len(every))]
        at = [None] * len(every) if at is None else at
        self.at = [units.at(at_P) for units, at_P in zip(every, at, strict=True)]
        here = [~(x.held_uHW & (at == NOWHERE)).flatten(1).any(1) for x, at in self._both()]
        self._here, self.away = ([f(x) for x in here] for f in (_places, lambda x: _places(~x)))
        self.pages_here = sum(
            int((at_uHW[some_u] >= 0).sum())
            for some_u, at_uHW in zip(self._here, self.at, strict=True)
        )
        self._mixed = any(units.mixed(at_uHW) for units, at_uHW in self._both())
        self.begun: Arriving | None = None  # of what is streamed first
        self._whole: Old | None = None

    def _both(self) -> Iterator[tuple[Units, Tensor]]:
        return zip(self.every, self.at, strict=True)

    @property
    def is_one(self) -> bool:
        """Whether one call can take everything: all pages are here, each dropped alike."""
        return not self._mixed and not any(len(away_u) for away_u in self.away)

    def whole(self) -> Old:
        """All old slots as operators take them, where one call can take them."""
        if self._whole is None or any(units.drops for units in self.every):
            tensors: list[Tensor] = []
            layouts: list[int] = []
            for units, at_uHW in self._both():
                if len(units.unit_u):
                    tensors += units.whole(at_uHW, self.batch)
                    layouts += units.layout
            self._whole = Old(tensors, layouts)
        return self._whole

    def here(self) -> Iterator[Call]:
        """Calls of what is on the device."""
        for number, (units, at_uHW) in enumerate(self._both()):
            some_u = self._here[number]
            if len(some_u):
                yield from self._calls(number, units.some(some_u), at_uHW[some_u])

    def streamed(self) -> Iterator[Call]:
        """Calls of what must be read, as much at once as finds room. Raises TierError."""
        begun, self.begun = self.begun, None
        for number, units in enumerate(self.every):
            if len(self.away[number]):
                batches = self._batches(number)
                lists = [batch.id_uHW[batch.held_uHW] for batch in batches]
                arrived = units.rows.shelf.stream(lists, begun)
                begun = None
                for batch, at_A in zip(batches, arrived, strict=True):
                    at_uHW = torch.full_like(batch.id_uHW, NOWHERE)
                    at_uHW[batch.held_uHW] = at_A
                    yield from self._calls(number, batch, at_uHW)

    def begin(self) -> None:
        """Starts to read what `streamed` needs first."""
        for number, units in enumerate(self.every):
            if len(self.away[number]):
                batch = self._batches(number)[0]
                self.begun = units.rows.shelf.begin(batch.id_uHW[batch.held_uHW])
                return

    def _batches(self, number: int) -> list[Units]:
        units = self.every[number]
        at_once = units.rows.shelf.at_once // units.id_uHW[0].numel()
        parts_u = torch.split(self.away[number], max(1, at_once))
        return [units.some(some_u) for some_u in parts_u]

    def _calls(self, number: int, units: Units, at_uHW: Tensor) -> Iterator[Call]:
        """One call, or where sequences share pages but not what they dropped, one for each."""
        if not self._mixed or not units.mixed(at_uHW):
            yield self._call(number, units, at_uHW)
            return
        for sequence in torch.unique(units.sequence_u).tolist():
            some_u = _places(units.sequence_u == sequence)
            yield self._call(number, units.some(some_u), at_uHW[some_u])

    def _call(self, number: int, units: Units, at_uHW: Tensor) -> Call:
        chunk_u = self.first[number] + units.unit_u * units.chunks
        old = Old(units.operands(at_uHW), list(units.layout))
        return Call(chunk_u.to(self._device), units.sequence_u.to(self._device), old, units)


def _places(where_u: Tensor) -> Tensor:
    return where_u.nonzero().flatten()


class Parts:
    """The outputs `[J, b, N, Q, E]` of some queries over all chunks, and their weights."""

    def __init__(
        self, plan: Plan, query_bNQD: Tensor, pages: Pages, logits: Logits, need_weights: bool
    ) -> None:
        self._plan, self._query_bNQD, self._pages = plan, query_bNQD, pages
        self._logits, self._need_weights = logits, need_weights
        self._before = sum(plan.chunks)  # chunks of old slots
        self._weights_JbNQS: Tensor | None = None

    def add_all(self) -> None:
        """Attends to everything: all pages are on the device."""
        found = self._attend(self._query_bNQD, self._pages, self._plan.whole())
        self._out_JbNQE, self._lse_JbNQ, weights_bNQS = found
        if self._need_weights:
            chunk_bNQJS = _by_chunk(weights_bNQS, len(self._lse_JbNQ))
            self._weights_JbNQS = chunk_bNQJS.permute(3, 0, 1, 2, 4)

    def add_each(self, calls: Iterator[Call]) -> None:
        """Attends to recent slots, and to what calls are of."""
        out_JbNQE, lse_JbNQ, weights_bNQS = self._attend(self._query_bNQD, self._pages, _NO_OLD)
        recent, pad = len(lse_JbNQ), torch.nn.functional.pad
        none = (0, 0) * (out_JbNQE.dim() - 1)
        self._out_JbNQE = pad(out_JbNQE, (*none, self._before, 0))
        self._lse_JbNQ = pad(lse_JbNQ, (*none[2:], self._before, 0), value=-torch.inf)
        if self._need_weights:
            chunk_bNQJS = _by_chunk(weights_bNQS, recent)
            self._weights_JbNQS = pad(chunk_bNQJS.permute(3, 0, 1, 2, 4), (*none, self._before, 0))
        for call in calls:
            self._add(call)

    def _add(self, call: Call) -> None:
        key_PDS, value_PSE, table_RW, counts_R = self._pages
        rows = len(call.chunk_u) * self._plan.heads
        none = Pages(key_PDS, value_PSE, table_RW.new_zeros(rows, 0), counts_R.new_zeros(rows))
        found = self._attend(self._query_bNQD[call.sequence_u], none, call.old)
        out_JuNQE, lse_JuNQ, weights_uNQS = found
        for chunk in range(len(lse_JuNQ)):
            at = (call.chunk_u + chunk, call.sequence_u)
            self._out_JbNQE[at], self._lse_JbNQ[at] = out_JuNQE[chunk], lse_JuNQ[chunk]
        if self._weights_JbNQS is not None:
            chunk_uNQJS = _by_chunk(weights_uNQS, len(lse_JuNQ))
            for chunk in range(len(lse_JuNQ)):
                at = (call.chunk_u + chunk, call.sequence_u)
                self._weights_JbNQS[at] = chunk_uNQJS[..., chunk, :]

    def _attend(self, query: Tensor, pages: Pages, old: Old) -> tuple[Tensor, Tensor, Tensor]:
        return ops.attend_parts(query, pages, self._logits, self._need_weights, old)

    def joined(self) -> Tensor:
        """The attention output, in the dtype of the queries."""
        out_bNQE, self.lse_bNQ = ops.join_parts(self._out_JbNQE, self._lse_JbNQ)
        return out_bNQE.to(self._query_bNQD.dtype)

    def weights(self, widths: Sequence[int]) -> Tensor:
        """The weights `[b, N, Q, S]` in the order of `dense`; to be asked for after `joined`.

        widths: dense slots of each layout. Those of a chunk are relative to it; these to all slots.
        """
        assert self._weights_JbNQS is not None, "they were not asked for"
        share_JbNQ = (self._lse_JbNQ - self.lse_bNQ).exp().nan_to_num(0.0)
        weights_JbNQS = self._weights_JbNQS * share_JbNQ[..., None]
        first, made = [*self._plan.first, self._before], []
        for begin, chunks, width in zip(first, self._plan.chunks, widths, strict=False):
            part = weights_JbNQS[begin : begin + chunks].permute(1, 2, 3, 0, 4)
            made.append(part.flatten(3)[..., :width])
        recent = weights_JbNQS[self._before :].permute(1, 2, 3, 0, 4).flatten(3)
        slots = self._pages.table_RW.shape[1] * self._pages.key_PDS.shape[2]
        return torch.cat([*made, recent[..., :slots]], dim=-1)


def _by_chunk(weights_bNQS: Tensor, chunks: int) -> Tensor:
    """Weights `[..., J, CHUNK]`, filled up with zeros."""
    missing = chunks * CHUNK - weights_bNQS.shape[-1]
    filled = torch.nn.functional.pad(weights_bNQS, (0, missing))
    return filled.reshape(*filled.shape[:-1], chunks, CHUNK)


_NO_OLD = Old([], [])
