"""The pipe of one layer: append, attend, observe, accumulate, score, select, store.

One object per layer of a cache. It knows no policy and no transformers; it answers `attend` with
the attention output of the new tokens and leaves the store at the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpress import ops
from kvpress.attend import prompt_attention
from kvpress.budget import UNLIMITED, Budget, Geometry, Limits, Quota
from kvpress.errors import CacheError, PolicyError
from kvpress.meter import LayerReport, Meter
from kvpress.observe import prompt_sums, step_sums
from kvpress.policy import Policy, Recipe
from kvpress.select import drop_one, kept_index, protect
from kvpress.store import Column, PagedRows, Survivors
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import EMPTY, Slots, Step


@dataclass(frozen=True)
class LayerKind:
    """How a layer attends:

    to everything, or to a sliding window (which is all that is kept of it).
    """

    index: int
    heads: int
    window: int | None = None

    @property
    def name(self) -> str:
        """`full` or `sliding`."""
        return "full" if self.window is None else "sliding"


@dataclass
class Run:
    """What the layers of one cache share."""

    recipe: Recipe
    layers: int  # compressed layers
    page_slots: int
    horizon: int
    meter: Meter
    notes: dict[str, None]  # an ordered set of lines for the report


class _Window(Policy):
    """What a sliding-window layer keeps: its newest tokens."""

    def score(self, slots: Slots) -> Tensor:
        return slots.position_BHS


class LayerPipe:
    """One layer of one cache: its rows, its logical length and its stages."""

    def __init__(self, kind: LayerKind, run: Run) -> None:
        self.kind, self.run = kind, run
        self.store: PagedRows | None = None
        self.reset()
        if kind.window is None:
            self.recipe, self.limits = run.recipe, run.recipe.limits
        else:
            keep = kind.window - 1  # the next token attends to itself and to window − 1 before it
            self.recipe = Recipe((_Window(),))
            self.limits = Limits(Budget.parse(keep), recent=keep)

    def reset(self) -> None:
        """Forgets every token."""
        self.store = None
        self.columns_seen = 0  # logical length: columns of the batch, padding included
        self.seen_B = torch.zeros(0, dtype=torch.int64)  # real tokens of each sequence, on the host
        self.decoded = 0
        self.evicted_at = 0  # logical length when tokens were last evicted
        self.padded_at = 0  # logical length after the last padded column
        self.quota_BH = torch.zeros(0, self.kind.heads, dtype=torch.int64)
        self.recent_B = torch.zeros(0, dtype=torch.int64)  # protected last tokens of each sequence

    def attend(
        self,
        query_BNPD: Tensor,
        key_BHPD: Tensor,
        value_BHPD: Tensor,
        valid_BP: Tensor | None,
        scaling: float,
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention output `[B, N, P, D]` of new tokens; stores them and brings the rows to the
        budget.

        valid_BP: bool, False for padding; None means that all tokens are real.
        """
        if self.store is None:
            self._start(key_BHPD, value_BHPD)
        valid_BP = None if valid_BP is None else valid_BP.cpu()
        new = key_BHPD.shape[2]
        before_B = self.seen_B
        self.columns_seen += new
        self.seen_B = before_B + (new if valid_BP is None else valid_BP.sum(1))
        if valid_BP is not None:
            self.padded_at = self.columns_seen
        tokens = (query_BNPD, key_BHPD, value_BHPD, valid_BP, before_B, scaling, softcap)
        if new > 1 or not bool((before_B > 0).all()):
            return self._prompt(*tokens)
        with torch.no_grad():
            return self._decode(*tokens)

    # ---- prompt
    # ---------------------------------------------------------------------------------------------

    def _prompt(
        self,
        query_BNPD: Tensor,
        key_BHPD: Tensor,
        value_BHPD: Tensor,
        valid_BP: Tensor | None,
        before_B: Tensor,
        scaling: float,
        softcap: float,
    ) -> Tensor:
        self.decoded = 0
        batch = len(before_B)
        groups = [list(range(batch))]
        if valid_BP is not None or not self._uniform():
            # Each sequence on its real tokens alone: a row alone equals a row in a batch by
            # construction.
            groups = [[b] for b in range(batch)]
        self._set_quotas()
        out_BNPD = None
        survivors, evicted = [], False
        for group in groups:
            real_P = (
                None
                if valid_BP is None
                else valid_BP[group[0]].nonzero().flatten().to(query_BNPD.device)
            )
            query, key, value = (
                _take(x, group, real_P, whole=len(group) == batch)
                for x in (query_BNPD, key_BHPD, value_BHPD)
            )
            columns = self._candidates(group, key, value, before_B)
            with self.run.meter.stage("prefill attention", key.device):
                position = columns[POSITION] if columns[KEY].shape[2] > key.shape[2] else None
                out = prompt_attention(
                    query,
                    columns[KEY],
                    columns[VALUE],
                    position,
                    scaling,
                    softcap,
                    self.kind.window,
                )
            with torch.no_grad():
                kept, dropped = self._compress_prompt(group, query, columns, scaling, softcap)
            survivors.append(kept)
            evicted |= dropped
            if len(group) == batch and real_P is None:
                out_BNPD = out
            else:
                if out_BNPD is None:
                    out_BNPD = out.new_zeros(
                        batch, *out.shape[1:2], key_BHPD.shape[2], out.shape[-1]
                    )
                where = slice(None) if real_P is None else real_P
                out_BNPD[group[0], :, where] = out[0]
        with torch.no_grad():
            self._keep(survivors, evicted, key_BHPD, value_BHPD, valid_BP, before_B)
        assert out_BNPD is not None, "a batch has at least one sequence"
        return out_BNPD

    def _candidates(
        self, group: list[int], key_BHPD: Tensor, value_BHPD: Tensor, before_B: Tensor
    ) -> dict[str, Tensor]:
        """What is stored of some sequences, in position order, followed by their new tokens."""
        batch, heads, new = key_BHPD.shape[:3]
        position_P = torch.arange(new) + before_B[group, None]
        position_BHP = position_P.to(key_BHPD.device)[:, None].expand(batch, heads, new)
        columns = {KEY: key_BHPD, VALUE: value_BHPD, POSITION: position_BHP}
        if MASS in self._store.columns:
            columns[MASS] = torch.zeros(batch, heads, new, device=key_BHPD.device)
        if not bool((self._store.counts_BH[group] > 0).any()):
            return columns
        old = self._store.dense_by_position(group)
        return {name: torch.cat([old[name].to(x.dtype), x], dim=2) for name, x in columns.items()}

    def _compress_prompt(
        self,
        group: list[int],
        query_BNPD: Tensor,
        columns: dict[str, Tensor],
        scaling: float,
        softcap: float,
    ) -> tuple[Survivors, bool]:
        """The slots of some sequences that stay, and whether any was dropped."""
        position_BHS, device = columns[POSITION], query_BNPD.device
        slots = Slots(
            layer=self.kind.index,
            position_BHS=position_BHS,
            seen_B=self.seen_B[group].to(device),
            new_tokens=query_BNPD.shape[2],
            fetch=columns.__getitem__,
            mass_BHS=columns.get(MASS),
        )
        with self.run.meter.stage("observe", device):
            request = self.recipe.stage("observe").observe(self._step())
            if request is not None and query_BNPD.shape[2]:
                sums = prompt_sums(
                    query_BNPD,
                    columns[KEY],
                    position_BHS,
                    self.kind.index,
                    request,
                    scaling,
                    softcap,
                )
                slots = replace(slots, attention_BHS=sums)
            if MASS in columns and query_BNPD.shape[2]:
                columns[MASS] = self.recipe.stage("accumulate").accumulate(slots).float()
                slots = replace(slots, mass_BHS=columns[MASS])
        with self.run.meter.stage("select", device):
            stored_BHS = position_BHS != EMPTY
            if bool((stored_BHS == stored_BHS[:1, :1]).all()) and bool(stored_BHS.all()):
                stored_BH = torch.full(stored_BHS.shape[:2], stored_BHS.shape[2])
            else:
                stored_BH = stored_BHS.sum(-1).cpu()
            keep_BH = self.quota_BH[group]
            if bool((stored_BH <= keep_BH).all()):
                kept_BHS, counts_BH = stored_BHS, stored_BH
            else:
                kept_BHS = self._select(slots, group)
                counts_BH = kept_BHS.sum(-1).cpu()  # the one synchronisation after a prompt
                self._check_quota(counts_BH, torch.minimum(stored_BH, keep_BH))
            everything = bool((counts_BH == position_BHS.shape[2]).all())
            if everything:
                return Survivors(tuple(group), columns, counts_BH), False
            index_BHK = kept_index(kept_BHS, counts_BH)
            kept = {name: _gather(x, index_BHK) for name, x in columns.items()}
            return Survivors(tuple(group), kept, counts_BH), bool((counts_BH < stored_BH).any())

    def _keep(
        self,
        survivors: list[Survivors],
        evicted: bool,
        key_BHPD: Tensor,
        value_BHPD: Tensor,
        valid_BP: Tensor | None,
        before_B: Tensor,
    ) -> None:
        """Puts a prompt into the store:

        appended where nothing was dropped, else refilled at its exact size.
        """
        with self.run.meter.stage("store", key_BHPD.device):
            if evicted:
                self.evicted_at = self.columns_seen
            if evicted or MASS in self._store.columns or not bool(self._store.counts.any()):
                self._store.fill(survivors, self._headroom())
                return
            self._append(key_BHPD, value_BHPD, valid_BP, before_B)

    # ---- decode
    # ---------------------------------------------------------------------------------------------

    def _decode(
        self,
        query_BN1D: Tensor,
        key_BH1D: Tensor,
        value_BH1D: Tensor,
        valid_B1: Tensor | None,
        before_B: Tensor,
        scaling: float,
        softcap: float,
    ) -> Tensor:
        store, meter, device = self._store, self.run.meter, query_BN1D.device
        self.decoded += 1
        with meter.stage("store", device):
            self._append(key_BH1D, value_BH1D, valid_B1, before_B)
        accumulates = MASS in store.columns
        excess_BH = store.counts_BH - self.quota_BH
        due = self._due() and bool((excess_BH > 0).any())
        request = self.recipe.stage("observe").observe(self._step()) if due or accumulates else None
        with meter.stage("decode attention", device):
            out, _, weights = ops.decode_rows(
                query_BN1D,
                store.pool(KEY),
                store.pool(VALUE),
                *store.operands(),
                scaling,
                softcap,
                request is not None,
            )
        if valid_B1 is not None:
            idle_B = ~valid_B1[:, 0].to(device)
            out = out.masked_fill(idle_B[:, None, None, None], 0)
            if request is not None:
                weights = weights.masked_fill(idle_B[:, None, None, None], 0)
        if not (due or accumulates):
            return out

        with meter.stage("observe", device):
            slots = Slots(
                layer=self.kind.index,
                position_BHS=store.dense(POSITION).long(),
                seen_B=self.seen_B.to(device),
                new_tokens=1,
                fetch=store.dense,
                mass_BHS=store.dense(MASS) if accumulates else None,
            )
            if request is not None:
                sums = step_sums(
                    weights[:, :, 0], slots.position_BHS, slots.seen_B, self.kind.index, request
                )
                slots = replace(slots, attention_BHS=sums)
            if accumulates:
                mass = self.recipe.stage("accumulate").accumulate(slots).float()
                store.write(MASS, mass)
                slots = replace(slots, mass_BHS=mass)
        if due:
            with meter.stage("select", device):
                self._evict(slots, excess_BH)
        return out

    def _evict(self, slots: Slots, excess_BH: Tensor) -> None:
        """Brings every row back to its quota while decoding."""
        self.evicted_at = self.columns_seen
        everyone = list(range(len(self.seen_B)))
        ordinary = "select" not in self.recipe.stage("select").replaces()
        if ordinary and int(excess_BH.max()) == 1:
            score = self.recipe.stage("score").score(slots)
            victim_BH = drop_one(score, slots.position_BHS, self._protected(slots, everyone))
            self._store.evict_one(victim_BH.flatten(), (excess_BH > 0).flatten())
            return
        wanted_BH = torch.minimum(self._store.counts_BH, self.quota_BH)
        kept_BHS = self._select(slots, everyone)
        counts_BH = kept_BHS.sum(-1).cpu()
        self._check_quota(counts_BH, wanted_BH)
        index_BHK = kept_index(kept_BHS, counts_BH)
        columns = {name: _gather(slots.fetch(name), index_BHK) for name in self._store.columns}
        if slots.mass_BHS is not None:
            columns[MASS] = _gather(slots.mass_BHS, index_BHK)
        self._store.fill([Survivors(tuple(everyone), columns, counts_BH)], self._headroom())

    # ---- the layer contract
    # ---------------------------------------------------------------------------------

    def select_sequences(self, index: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `index[i]`, with everything that belongs to it."""
        if self.store is None:
            return
        chosen = list(index)
        self.store = self.store.select_sequences(chosen, self._headroom())
        self.seen_B, self.quota_BH = self.seen_B[chosen], self.quota_BH[chosen]
        self.recent_B = self.recent_B[chosen]

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` columns.

        Raises CacheError where tokens evicted since would have to come back.
        """
        if tokens == 0 or self.store is None:
            return
        length = self.columns_seen - tokens
        if length < 0:
            raise CacheError(
                f"crop(-{tokens}) on a cache of {self.columns_seen} tokens: crop at most that many."
            )
        if length == 0:
            self.reset()
            return
        if length < self.evicted_at:
            raise CacheError(
                f"crop(-{tokens}) would go back to {length} tokens, but layer {self.kind.index}"
                f" evicted tokens at {self.evicted_at}, and they are gone. Crop less, or use a"
                " policy with interval=0 or 'full'."
            )
        if length < self.padded_at:
            raise CacheError(
                f"crop(-{tokens}) would go back to {length} columns, behind the last padded column "
                f"({self.padded_at}). Crop less, or run the sequences without padding."
            )
        if MASS in self.store.columns:
            raise CacheError(
                f"crop(-{tokens}): the policy {self.recipe} accumulated attention of the cropped"
                " tokens, which cannot be taken back. Use a policy without accumulated scores,"
                " such as 'snapkv' or 'full'."
            )
        self.columns_seen = length
        self.seen_B = self.seen_B - tokens
        columns = self.store.dense_by_position(range(len(self.seen_B)))
        position_BHS = columns[POSITION]
        kept_BHS = (position_BHS != EMPTY) & (
            position_BHS < self.seen_B.to(position_BHS.device)[:, None, None]
        )
        counts_BH = kept_BHS.sum(-1).cpu()
        index_BHK = kept_index(kept_BHS, counts_BH)
        kept = {name: _gather(x, index_BHK) for name, x in columns.items()}
        self.store.fill(
            [Survivors(tuple(range(len(counts_BH))), kept, counts_BH)], self._headroom()
        )

    @property
    def is_croppable(self) -> bool:
        """Whether tokens fed from now on can be taken back exactly."""
        decode_evicts = self.limits is not None and self.limits.interval > 0
        return not decode_evicts and not self.recipe.accumulates

    def kept_positions(self, sequence: int, head: int) -> list[int]:
        """The sorted logical positions of one row; padding has no position."""
        if self.store is None:
            return []
        position_S = self.store.dense(POSITION, [sequence])[0, head]
        return sorted(int(p) for p in position_S[position_S != EMPTY])

    def report(self) -> LayerReport:
        """The ledger of this layer."""
        if self.store is None:
            return LayerReport(self.kind.index, self.kind.name, [], 0, 0)
        limit = torch.iinfo(torch.int64).max if self.kind.window is None else self.kind.window - 1
        slot_bytes = self.store.columns[KEY].slot_bytes + self.store.columns[VALUE].slot_bytes
        tokens = int(self.seen_B.clamp_max(limit).sum())
        return LayerReport(
            index=self.kind.index,
            kind=self.kind.name,
            slots_kept=self.store.counts_BH.tolist(),
            bytes_held=self.store.nbytes,
            bytes_full=tokens * self.kind.heads * slot_bytes,
        )

    # ---- small parts
    # ----------------------------------------------------------------------------------------

    @property
    def _store(self) -> PagedRows:
        assert self.store is not None, "attend() starts the store"
        return self.store

    def _start(self, key_BHPD: Tensor, value_BHPD: Tensor) -> None:
        batch, heads, _, key_width = key_BHPD.shape
        columns = {
            KEY: Column((key_width,), key_BHPD.dtype),
            VALUE: Column((value_BHPD.shape[-1],), value_BHPD.dtype),
        }
        if self.recipe.accumulates:
            columns[MASS] = Column((), torch.float32)
        self.store = PagedRows(batch, heads, columns, self.run.page_slots, key_BHPD.device)
        self.seen_B = torch.zeros(batch, dtype=torch.int64)

    def _uniform(self) -> bool:
        counts_BH = self._store.counts_BH
        same = (counts_BH == counts_BH[:1]).all() and (self.seen_B == self.seen_B[:1]).all()
        return bool(same)

    def _step(self) -> Step:
        return Step(self.kind.index, self.decoded, self.run.horizon)

    def _due(self) -> bool:
        interval = self.limits.interval if self.limits else 0
        return interval > 0 and self.decoded % interval == 0

    def _headroom(self) -> int:
        return self.limits.interval if self.limits else 0

    def _append(
        self, key_BHPD: Tensor, value_BHPD: Tensor, valid_BP: Tensor | None, before_B: Tensor
    ) -> None:
        if valid_BP is None:
            offset_BP = torch.arange(key_BHPD.shape[2]).expand(len(before_B), -1)
        else:
            offset_BP = valid_BP.cumsum(1) - 1
        position_BH1P = (before_B[:, None] + offset_BP)[:, None].to(key_BHPD.device)
        self._store.append({KEY: key_BHPD, VALUE: value_BHPD, POSITION: position_BH1P}, valid_BP)

    def _set_quotas(self) -> None:
        """Decides how many slots every row may keep from now on. Raises BudgetError."""
        batch, heads = len(self.seen_B), self.kind.heads
        self.recent_B = torch.zeros(batch, dtype=torch.int64)
        self.quota_BH = torch.full((batch, heads), UNLIMITED)
        if self.limits is None:
            return
        geometry = Geometry(
            self.run.layers,
            heads,
            self._store.page_slots,
            self._store.page_bytes(),
            self._headroom(),
        )
        allocate = self.recipe.stage("allocate").allocate
        for b, seen in enumerate(self.seen_B.tolist()):
            quota = self.limits.quota(seen, geometry)
            self.recent_B[b] = quota.recent
            self.quota_BH[b] = torch.tensor(
                allocate(quota.slots, self.kind.index, self.run.layers, heads)
            )
            if self.kind.window is None:
                self._explain(seen, quota)

    def _explain(self, seen: int, quota: Quota) -> None:
        """Notes for the report where a budget evicts less than its fraction promises."""
        budget = f"budget {self.limits.budget if self.limits else ''}"
        if quota.floored:
            line = (
                f"The {budget} of {seen} tokens is below the protected tokens (sink {quota.sink},"
                f" recent {quota.recent}): {min(seen, quota.slots)} tokens were kept instead."
            )
            self.run.notes[line] = None
        elif seen <= quota.slots:
            self.run.notes[
                f"A prompt of {seen} tokens is within its {budget}: nothing was evicted."
            ] = None

    def _protected(self, slots: Slots, group: Sequence[int]) -> Tensor:
        assert self.limits is not None, "only layers with a budget select"
        recent_b = self.recent_B[group].to(slots.position_BHS.device)
        return protect(slots.position_BHS, slots.seen_B, self.limits.sink, recent_b)

    def _select(self, slots: Slots, group: Sequence[int]) -> Tensor:
        """True for the slots of some sequences that stay, by their quotas."""
        score_BHS = self.recipe.stage("score").score(slots)
        if self.decoded == 0 and bool(score_BHS.isnan().any()):
            raise PolicyError(
                f"{self.recipe} gave NaN scores in layer {self.kind.index}; scores must be numbers."
            )
        select: Callable[..., Any] = self.recipe.stage("select").select
        keep_BH = self.quota_BH[group].to(slots.position_BHS.device)
        kept: Tensor = select(slots, score_BHS, self._protected(slots, group), keep_BH)
        return kept

    def _check_quota(self, counts_BH: Tensor, wanted_BH: Tensor) -> None:
        if not torch.equal(counts_BH, wanted_BH):
            raise PolicyError(
                f"{self.recipe} kept {counts_BH.tolist()} slots in layer {self.kind.index}, but the"
                f" budget asks for exactly {wanted_BH.tolist()}. The select stage must return that"
                " many per row."
            )


def _take(x_BHPD: Tensor, group: list[int], real_P: Tensor | None, whole: bool) -> Tensor:
    """The real tokens of some sequences."""
    if not whole:
        x_BHPD = x_BHPD[group]
    return x_BHPD if real_P is None else x_BHPD.index_select(2, real_P)


def _gather(x_BHSX: Tensor, index_BHK: Tensor) -> Tensor:
    """The slots at `index_BHK` of a dense column."""
    extra = x_BHSX.dim() - 3
    index = index_BHK.view(*index_BHK.shape, *[1] * extra)
    return x_BHSX.gather(2, index.expand(*index_BHK.shape, *x_BHSX.shape[3:]))
