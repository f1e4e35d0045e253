"""One layer of one cache: its rows, its logical length, its quotas, and the layer contract."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.rotation import Rotation
from kvpress.host import lasting
from kvpress.pipe.state.channels import CHANNELS, check_counts
from kvpress.pipe.state.context import Growth, Run
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.budget import UNLIMITED, Budget, Limits
from kvpress.policy.formats import page_slots
from kvpress.policy.recipe import Newest, Recipe
from kvpress.policy.slots import Step
from kvpress.report.figures import LayerReport
from kvpress.store import Column, FormattedRows, PagedRows, Rows, Survivors
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import EMPTY, LayerKind


class Layer:
    """The state of one layer. The phases (prompt.py, decode.py, drafts.py) work on it."""

    def __init__(self, kind: LayerKind, run: Run) -> None:
        self.kind, self.run = kind, run
        self.store: Rows | None = None  # made with the first tokens
        self.reset()
        if kind.window is None:
            self.recipe, self.limits = run.recipe, run.recipe.limits
            self.grows = self.limits is not None and self.limits.grows
        else:
            keep = kind.window - 1  # the next token attends to itself and to window − 1 before it
            self.recipe = Recipe((Newest(),))
            self.limits = Limits(Budget.parse(keep), recent=keep)
            self.grows = False  # whether decoded tokens raise the quotas

    @lasting
    def reset(self) -> None:
        """Forgets every token."""
        self.store = None
        self.run.growths.clear()
        self.token_dtype = torch.float32  # of the model's keys and values; known with the store
        self.columns_seen = 0  # logical length: columns of the batch, padding included
        self.seen_B = host.zeros(0)  # real tokens of each sequence, on the host
        self._decoded_B = host.zeros(0)  # tokens decoded since the last prompt
        self._decoded: int | None = None  # the same for every sequence, where it is
        self.evicted_at = 0  # logical length when tokens were last evicted
        self.prompted_at = 0  # logical length after the last prompt or prompt chunk
        self.padded_at = 0  # logical length after the last padded column
        self.quota_R = host.zeros(0)  # slots that every row may keep
        self.recent_B = host.zeros(0)  # protected last tokens of each sequence
        self.demand_B = host.zeros(0, dtype=torch.float64)  # of slots; NaN: not known yet
        self.portion_B = host.zeros(0, dtype=torch.float64)  # of the budget, while decoding
        self.growth: Growth | None = None  # of its quotas, once a step needed it
        self.grown = -1  # the version of `growth` that the quotas are
        self.threshold_B = host.zeros(
            0, dtype=torch.float32
        )  # of merging; NaN: nothing was evicted yet
        self._in_step: bool | None = None  # None: not known
        self._excess: int | None = None  # None: not known
        self._shortest = 0  # the same of the row that is the farthest below its quota
        self.cut: set[int] = set()  # sequences of which the last prompt evicted, before a trim
        self.drafted = 0  # tokens of every sequence that may still be taken back; see drafts.py
        self.draft_weights: list[Tensor] = []  # what they attended to: blocks `[B, N, P, S]`
        self.watched: dict[int, Tensor] = {}  # last queries [N, W, D] of sequences; formatting.py
        self.logits = (1.0, 0.0)  # scaling and softcap of these queries
        self.blocks: tuple[Tensor, int] | None = None  # of prompts: computed per head [N], all

    # The layer contract

    @lasting
    def select_sequences(self, index: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `index[i]`, with everything that belongs to it."""
        if self.store is None:
            return
        chosen = list(index)
        if len(chosen) < len(self.seen_B):
            self.note_peak()
        with self.store.lock:
            self.store = self.store.select_sequences(chosen)
            self.store.trim()
        self.seen_B, self.quota_R = self.seen_B[chosen], self.quota_BH[chosen].flatten()
        self.recent_B, self.decoded_B = self.recent_B[chosen], self.decoded_B[chosen]
        self.demand_B, self.threshold_B = self.demand_B[chosen], self.threshold_B[chosen]
        self.portion_B = self.portion_B[chosen]
        self.draft_weights = [weights[chosen] for weights in self.draft_weights]
        kept = {i: self.watched.get(b) for i, b in enumerate(chosen)}
        self.watched = {i: query for i, query in kept.items() if query is not None}
        self.refresh()

    @lasting
    def unshare(self) -> None:
        """Gives every row pages of its own, side by side as after a prompt."""
        if self.store is None:
            return
        with self.store.lock:
            self.store.unshare(self._room)
        self.rows_changed()
        self._limit_pages()

    def contents(self) -> list[tuple[int, ...]]:
        """For each sequence, what tells whether it holds the same as another one."""
        pages = self.rows.pages_of_sequences()
        return [(seen, *held) for seen, held in zip(self.seen_B.tolist(), pages, strict=True)]

    def check_crop(self, tokens: int) -> None:
        """Raises CacheError where forgetting the last `tokens` columns cannot be exact."""
        length = self.columns_seen - tokens
        if length < 0:
            raise CacheError(
                f"crop(-{tokens}) on a cache of {self.columns_seen} tokens: crop at most that many."
            )
        if tokens == 0 or length == 0 or self.store is None:
            return
        if length < self.evicted_at:
            raise CacheError(
                f"crop(-{tokens}) would go back to {length} tokens, but layer {self.kind.index}"
                f" evicted tokens at {self.evicted_at}, and they are gone. Crop less, call"
                " activate_past_recording() before the tokens are fed, or use a policy and a model"
                " that evict nothing after that."
            )
        if length < self.padded_at:
            raise CacheError(
                f"crop(-{tokens}) would go back to {length} columns, behind the last padded column "
                f"({self.padded_at}). Crop less, or run the sequences without padding."
            )
        if length < self.prompted_at and self.limits is not None and self.limits.interval > 1:
            raise CacheError(
                f"crop(-{tokens}) would go back to {length} tokens, behind the end of the last"
                f" prompt chunk ({self.prompted_at}), where the interval of {self.recipe} began"
                " again. Crop less, or use interval=1."
            )
        if self.recipe.accumulates and tokens > self.drafted:
            raise CacheError(
                f"crop(-{tokens}): the policy {self.recipe} accumulated attention of the cropped"
                " tokens, which cannot be taken back. Call activate_past_recording() before they"
                " are fed, or use a policy without accumulated scores."
            )

    @lasting
    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` columns. Raises CacheError where that cannot be exact."""
        self.check_crop(tokens)
        if tokens == 0 or self.store is None:
            return
        if tokens == self.columns_seen:
            self.reset()
            return
        self.note_peak()  # what drafts attended to goes with them
        self.columns_seen -= tokens
        self.seen_B = self.seen_B - tokens
        certain = max(0, tokens - self.drafted)  # drafted tokens are not watched
        for b, query_NWD in self.watched.items():
            self.watched[b] = query_NWD[:, : max(0, query_NWD.shape[1] - certain)]
        with self.rows.lock:  # since then nothing was evicted: the tokens are the last slots
            self.rows.truncate(tokens)
        self.rows_changed()
        self._take_back(tokens)

    def _take_back(self, tokens: int) -> None:
        """Uncounts the last tokens: drafted ones first, then decoded ones."""
        drafted = min(tokens, self.drafted)
        self.drafted -= drafted
        self.decoded_B = (self.decoded_B - (tokens - drafted)).clamp_min(0)
        while drafted and self.draft_weights:
            last = self.draft_weights.pop()
            kept = last.shape[2] - drafted
            if kept > 0:
                self.draft_weights.append(last[:, :, :kept].clone())
            drafted = max(0, -kept)

    @lasting
    def fork(self, run: Run) -> Layer:
        """A copy for another cache. Both use the same pages until one of them writes to them."""
        other = copy.copy(self)
        other.run = run
        if self.store is not None:
            with self.store.lock:
                other.store = self.store.select_sequences(range(len(self.seen_B)))
            other.quota_R, other.recent_B = self.quota_R.clone(), self.recent_B.clone()
            other._decoded_B = self._decoded_B.clone()
            other.demand_B, other.threshold_B = self.demand_B.clone(), self.threshold_B.clone()
            other.portion_B, other.growth = self.portion_B.clone(), None
            other.draft_weights, other.watched = list(self.draft_weights), dict(self.watched)
            other._limit_pages()
        return other

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        other = memo[id(self)] = copy.copy(self)
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    @property
    def is_croppable(self) -> bool:
        """Whether any tokens decoded from now on can be taken back exactly."""
        steady = self.limits is None or self.limits.interval == 0
        exact = not self.recipe.accumulates and not self.recipe.formats
        return self.run.recording or (steady and exact)

    def kept_positions(self, sequence: int, head: int) -> list[int]:
        """The sorted logical positions of one row; padding has no position."""
        if self.store is None:
            return []
        position_S = self.store.dense(POSITION, [sequence])[0, head]
        return sorted(int(p) for p in position_S[position_S != EMPTY])

    def count_blocks(self, computed_BN: Tensor, causal: int) -> None:
        """Notes how many blocks of each head of a prompt were computed, of so many."""
        computed_N, all_ = self.blocks or (0, 0)
        self.blocks = computed_N + computed_BN.sum(0), all_ + len(computed_BN) * causal

    @property
    def density(self) -> list[float]:
        """The share of blocks that was computed, of every query head; empty: all were."""
        if self.blocks is None:
            return []
        computed_N, all_ = self.blocks
        shares: list[float] = (computed_N.double() / all_).tolist()
        return shares

    @property
    def bytes_held(self) -> int:
        """The storages of this layer, with what drafts attended to and queries that are watched."""
        if self.store is None:
            return 0
        watched = (*self.draft_weights, *self.watched.values())
        return self.store.nbytes + sum(tensor.nbytes for tensor in watched)

    def note_peak(self, more: int = 0) -> None:
        """To be called before this layer gives memory back.

        All layers do so in the same pass: the first of them notes what all hold then, and `more`
        bytes. Between two such passes a cache only grows, so that other tokens cost nothing.
        """
        if self.run.noted_at != self.columns_seen:
            self.run.noted_at = self.columns_seen
            self.run.note_peak(more)

    def report(self) -> LayerReport:
        """The ledger of this layer."""
        if self.store is None:
            return LayerReport(self.kind.index, self.kind.name, [], 0, 0)
        limit = torch.iinfo(torch.int64).max if self.kind.window is None else self.kind.window - 1
        slot_bytes = (self.key_width + self.value_width) * self.token_dtype.itemsize
        tokens = int(self.seen_B.clamp_max(limit).sum())
        return LayerReport(
            index=self.kind.index,
            kind=self.kind.name,
            slots_kept=self.store.counts_BH.tolist(),
            bytes_held=self.bytes_held,
            bytes_full=tokens * self.kind.heads * slot_bytes,
            bytes_shared=self.store.nbytes_shared,
            density=self.density,
        )

    def changes(self) -> None:
        """Says that a forward pass changes this layer: until it is done the cache is not whole."""
        self.run.broken = self.kind.index

    def advance_one(self) -> None:
        """Counts one decoded token of every sequence."""
        self.changes()
        self.columns_seen += 1
        self.seen_B = self.run.one_more(self.seen_B)

    def advance(self, columns: int, seen_B: Tensor, padded: bool) -> None:
        """Counts new columns, and the real tokens among them."""
        self.changes()
        self._in_step = None
        self.columns_seen += columns
        self.seen_B = seen_B
        if padded:
            self.padded_at = self.columns_seen

    # What the phases need

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Adds the time of the block to a stage of the report."""
        rows = self.rows
        return self.run.meter.stage(stage, None if rows.on_host else rows.device)

    @property
    def rotation(self) -> Rotation | None:
        """How keys turn with their position, where a policy needs it and they do."""
        return self.run.rotations[self.kind.index] if self.run.rotations else None

    @property
    def wide_rows(self) -> int:
        """Rows whose old slots a guard keeps at more bits."""
        aging = None if self.store is None else self.store.aging
        return 0 if aging is None else aging.wide_rows

    @property
    def rows(self) -> Rows:
        """The store, which exists once tokens were fed."""
        assert self.store is not None, "start() makes the store"
        return self.store

    @property
    def key_width(self) -> int:
        """Channels of the model's keys; positions and counts may stand behind them."""
        return self.rows.columns[KEY].shape[0] - self.extra_channels

    @property
    def counts_tokens(self) -> bool:
        """Whether the last channel of a key is the logarithm of its number of tokens."""
        return self.recipe.merging is not None and self.recipe.merging.counts

    @property
    def extra_channels(self) -> int:
        """Channels of stored keys that are not the model's."""
        return (CHANNELS if self.kind.slopes else 0) + self.counts_tokens

    @property
    def value_width(self) -> int:
        """Channels of values."""
        return self.rows.columns[VALUE].shape[0]

    def start(self, key_BHPD: Tensor, value_BHPD: Tensor) -> None:
        """Makes the store for rows of this shape."""
        batch, heads, _, key_width = key_BHPD.shape
        self.token_dtype = key_BHPD.dtype
        columns = self.columns(key_width, value_BHPD.shape[-1])
        if self.counts_tokens:
            check_counts({self.token_dtype, columns[KEY].dtype}, key_width)
        self.store = self.new_store(
            PagedRows(batch, heads, columns, self.run.page_slots, key_BHPD.device)
        )
        self.seen_B = host.zeros(batch)
        self.decoded_B, self.recent_B = torch.zeros_like(self.seen_B), torch.zeros_like(self.seen_B)
        self.demand_B = host.full((batch,), torch.nan, dtype=torch.float64)
        self.portion_B = host.full((batch,), 1.0, dtype=torch.float64)
        merging = self.recipe.merging
        threshold = torch.nan if merging is None else merging.initial
        self.threshold_B = torch.full(
            (batch,), threshold, device=key_BHPD.device, dtype=torch.float32
        )
        self._in_step = self._excess = None
        self.quota_R = host.full((batch * heads,), UNLIMITED)

    def new_store(self, rows: PagedRows) -> Rows:
        """The store of this layer, from an empty one for slots as they come."""
        if not self.recipe.formats:
            return rows
        ordered = self.limits is None and not self.recipe.accumulates
        return FormattedRows(rows, page_slots(self.recipe.packing), self.recipe.residual, ordered)

    @property
    def rewritten(self) -> list[str]:
        """The columns of slots that are written anew where others are dropped."""
        return self.rows.rewritten

    def keep(self, survivors: Survivors) -> None:
        """Leaves of some sequences only what survived; merged slots are written anew."""
        if self.rows.refills:
            self.refill([survivors])
        else:
            self.rows.retain(survivors)
            self.rows_changed()

    def columns(self, key_width: int, value_width: int) -> dict[str, Column]:
        """What the store keeps of a slot."""
        dtype = self.run.cache_dtype or self.token_dtype
        columns = {
            KEY: Column((key_width,), dtype, slot_last=True),
            VALUE: Column((value_width,), dtype),
        }
        if self.recipe.accumulates:
            columns[MASS] = Column((), torch.float32, volatile=True)
        return columns

    @property
    def headroom(self) -> int:
        """Slots by which rows may exceed their quota between two evictions."""
        return self.limits.interval if self.limits else 0

    @property
    def _room(self) -> int:
        """Free slots that a refilled row gets at once; more pages come when they are needed."""
        return min(self.headroom, self.run.page_slots)

    def seen_before(self, batch: int) -> Tensor:
        """Real tokens that each of `batch` sequences has seen: int64, on the host."""
        return host.zeros(batch) if self.store is None else self.seen_B

    def step(self, sequence: int, new_tokens: int) -> Step:
        """Where a sequence of this layer is, for policies."""
        return Step(self.kind.index, self.decoded(sequence), new_tokens, self.run.horizon)

    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens seen, quotas of rows, and protected last tokens, where the operators are."""
        if self.rows.on_host:
            return self.seen_B, self.quota_R, self.recent_B
        device = self.rows.device
        return self.seen_B.to(device), self.quota_R.to(device), self.recent_B.to(device)

    @property
    def quota_BH(self) -> Tensor:
        """Slots that every row may keep: int64 on the host."""
        return self.quota_R.view(-1, self.kind.heads)

    @property
    @lasting
    def decoded_B(self) -> Tensor:
        """Tokens that every sequence decoded since its last prompt: int64 on the host."""
        if self._decoded is not None:
            self._decoded_B = torch.full_like(self._decoded_B, self._decoded)
            self._decoded = None
        return self._decoded_B

    @decoded_B.setter
    def decoded_B(self, value: Tensor) -> None:
        self._decoded_B, self._decoded = value, None

    def decoded(self, sequence: int) -> int:
        """Tokens that a sequence decoded since its last prompt."""
        return int(self._decoded_B[sequence]) if self._decoded is None else self._decoded

    def count_decoded(self, tokens: int, group: Sequence[int] | None = None) -> None:
        """Counts decoded tokens of some sequences, or of all.

        While all are in step that is a number: a decode step makes as few tensors as it can.
        """
        everybody = group is None or len(group) == len(self.seen_B)
        if everybody and self.in_step:
            self._decoded = self.decoded(0) + tokens
        else:
            self.decoded_B[slice(None) if group is None else list(group)] += tokens

    @property
    def in_step(self) -> bool:
        """Whether every sequence has seen tokens and decoded as many of them as the others."""
        if self._in_step is None:
            decoded_B = self.decoded_B
            same = bool((decoded_B == decoded_B[:1]).all())
            self._in_step = same and bool((self.seen_B > 0).all())
        return self._in_step

    @property
    def excess(self) -> int:
        """By how many slots the fullest row, seen from its quota, is above it; below: negative."""
        if self._excess is None:
            low, high = (self.rows.counts - self.quota_R).aminmax()
            self._excess, self._shortest = int(high), int(low)
        return self._excess

    def take_quotas(self, growth: Growth) -> None:
        """Takes the quotas that have grown."""
        follows = self._excess is not None and self.grown == growth.version - 1
        if follows and (self._excess == self._shortest or growth.least == growth.most):
            assert self._excess is not None, "just checked"
            self._excess, self._shortest = self._excess - growth.least, self._shortest - growth.most
        else:
            self._excess = None
        self.grown = growth.version
        self.quota_R, self.recent_B = growth.quota_R, growth.recent_B

    def count_step(self, evicted: bool) -> None:
        """Counts what the operator `decode_step` did.

        Every row got a token; where something was evicted, rows above their quotas lost one.
        """
        everywhere = evicted and self._shortest == self._excess
        self.rows.count_step(self.quota_R if evicted else None, everywhere)
        if self._excess is not None:
            self._excess, self._shortest = self._excess + 1, self._shortest + 1
        if evicted:
            self._excess, self._shortest = 0, min(self._shortest, 0)
            self.evicted_at = self.columns_seen

    def rows_changed(self) -> None:
        """Forgets what was known of the counts of rows."""
        self._excess = None

    def refresh(self) -> None:
        """Forgets everything that was derived from a state that was replaced."""
        self._in_step = self._excess = self.growth = None
        self._limit_pages()

    def append(self, tokens: Tokens, group: Sequence[int], before_b: Tensor) -> None:
        """Stores new tokens of some sequences behind those that are there."""
        offset_P = host.arange(tokens.key_bHPD.shape[2])
        position_b1P = (before_b[:, None] + offset_P)[:, None].to(tokens.key_bHPD.device)
        columns = {KEY: tokens.key_bHPD, VALUE: tokens.value_bHPD, POSITION: position_b1P}
        self.rows.append(columns, group)
        self.rows_changed()

    def refill(self, survivors: Sequence[Survivors]) -> None:
        """Replaces the rows of some sequences by what survived, in pages of the exact size."""
        self.note_peak()
        self.rows.fill(survivors, self._room)
        self.rows_changed()
        self._limit_pages()

    def _limit_pages(self) -> None:
        """Tells the store how many pages rows at their quotas can ever need."""
        if self.store is None:
            return
        if self.limits is not None and self.limits.interval and not self.grows:
            most_BH = self.quota_BH.clamp_max(2**40) + self.headroom
            self.store.limit(int((-(-most_BH // self.store.page_slots)).sum()))
