"""One layer of one cache: its rows, what belongs to its sequences, and how far it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.formulas.rotation import Rotation
from kvpress.host import lasting
from kvpress.pipe.state import channels
from kvpress.pipe.state.context import Context
from kvpress.pipe.state.growth import Excess
from kvpress.pipe.state.reads import Reads
from kvpress.pipe.state.sequences import Sequences
from kvpress.pipe.state.stores import Stores
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.budget import Budget, Limits
from kvpress.policy.recipe import Newest, Recipe, recalled
from kvpress.store import Rows, Survivors
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.types import LayerKind


class Layer:
    """The state of one layer. The phases (prompt.py, decode.py, drafts.py) work on it."""

    def __init__(self, kind: LayerKind, context: Context) -> None:
        self.kind, self.context = kind, context
        self.recipe, self.limits = context.recipe, context.recipe.limits
        if kind.window is not None:
            keep = kind.window - 1  # the next token attends to itself and to window − 1 before it
            self.recipe = Recipe((Newest(),))
            self.limits = Limits(Budget.parse(keep), recent=keep)
        self.recalled = recalled(self.recipe)  # last queries that scores are shown while decoding
        self.grows = self.limits is not None and self.limits.grow(self.recipe.allocates)
        self.stores = Stores.of(kind, context, self.recipe, self.limits)
        self.reset()

    @lasting
    def reset(self) -> None:
        """Forgets every token."""
        self.store: Rows | None = None  # made with the first tokens
        self.sequences = Sequences(self.kind.heads)
        self.excess = Excess()
        self.context.forget()
        self.token_dtype = torch.float32  # of the model's keys and values; known with the store
        self.logits = (1.0, 0.0)  # scaling and softcap of the queries that are watched
        self.columns_seen = 0  # logical length: columns of the batch, padding included
        self.evicted_at = 0  # logical length when tokens were last evicted
        self.prompted_at = 0  # logical length after the last prompt or prompt chunk
        self.padded_at = 0  # logical length after the last padded column
        self.evicted_in_prompt: set[int] = set()  # sequences, by the last prompt, before a trim
        self.blocks: tuple[Tensor, int] | None = None  # of prompts: computed per head [N], all
        self.reads = Reads()  # of decode steps, where they read some pages only
        self.seen: Any = None  # by layers that read this one in the same pass; see sharing.py
        self._in_step: bool | None = None  # None: not known

    @property
    def rows(self) -> Rows:
        """The store, which exists once tokens were fed."""
        assert self.store is not None, "start() makes the store"
        return self.store

    def start(self, key_BHQD: Tensor, value_BHQD: Tensor) -> None:
        """Makes the store for rows of this shape."""
        ranges = self.context.protected(len(key_BHQD), self.kind)
        self.token_dtype = key_BHQD.dtype
        self.store = self.stores.new(key_BHQD, value_BHQD)
        self.sequences.begin(len(key_BHQD), self.stores.starts, key_BHQD.device)
        if ranges:
            self.sequences.protect(ranges)
        self._in_step, self.excess = None, Excess()

    # Whole sequences

    @lasting
    def select_sequences(self, index: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `index[i]`, with everything that belongs to it."""
        if self.store is None:
            return
        if len(index) < len(self.sequences):
            self.note_peak()
        with self.store.memory.lock:
            self.store = self.store.select_sequences(list(index))
            self.store.memory.trim()
        self.sequences = self.sequences.select(index)
        self.refresh()

    @lasting
    def unshare(self) -> None:
        """Gives every row pages of its own, side by side as after a prompt."""
        if self.store is None:
            return
        with self.store.memory.lock:
            self.store.unshare(self.stores.room)
        self.excess.forget()
        self.stores.limit(self.store, self.sequences.quota_BH)

    @lasting
    def fork(self, context: Context) -> Layer:
        """A copy for another cache. Both use the same pages until one of them writes to them."""
        other = copy.copy(self)
        other.context, other.excess, other.reads, other.seen = context, Excess(), Reads(), None
        other.sequences = self.sequences.clone()
        if self.store is not None:
            with self.store.memory.lock:
                other.store = self.store.select_sequences(range(len(self.sequences)))
            other.stores.limit(other.store, other.sequences.quota_BH)
        return other

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        other = memo[id(self)] = copy.copy(self)
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def refresh(self) -> None:
        """Forgets everything that was derived from a state that was replaced."""
        self._in_step, self.excess = None, Excess()
        self.stores.limit(self.store, self.sequences.quota_BH)

    # Tokens

    def mark_dirty(self) -> None:
        """Says that a forward pass changes this layer: until it is done the cache is not whole."""
        self.context.dirty = self.kind.index

    def advance_one(self) -> None:
        """Counts one decoded token of every sequence."""
        self.mark_dirty()
        self.columns_seen += 1
        self.sequences.seen_B = self.context.one_more(self.sequences.seen_B)

    def advance(self, columns: int, seen_B: Tensor, padded: bool) -> None:
        """Counts new columns, and the real tokens among them."""
        self.mark_dirty()
        self._in_step = None
        self.columns_seen += columns
        self.sequences.seen_B = seen_B
        if padded:
            self.padded_at = self.columns_seen

    def count_decoded(self, tokens: int, group: Sequence[int] | None = None) -> None:
        """Counts decoded tokens of some sequences, or of all."""
        decoded = self.sequences.decoded
        if (group is None or len(group) == len(decoded)) and self.in_step:
            decoded.add_to_all(tokens)
        else:
            decoded.tokens_B[slice(None) if group is None else list(group)] += tokens

    @property
    def in_step(self) -> bool:
        """Whether every sequence has seen tokens and decoded as many of them as the others."""
        if self._in_step is None:
            decoded_B = self.sequences.decoded.tokens_B
            same = bool((decoded_B == decoded_B[:1]).all())
            self._in_step = same and bool((self.sequences.seen_B > 0).all())
        return self._in_step

    # Slots

    def append(self, tokens: Tokens, group: Sequence[int], before_b: Tensor) -> None:
        """Stores new tokens of some sequences behind those that are there."""
        offset_Q = host.arange(tokens.key_bHQD.shape[2])
        position_b1Q = (before_b[:, None] + offset_Q)[:, None].to(tokens.key_bHQD.device)
        columns = {KEY: tokens.key_bHQD, VALUE: tokens.value_bHQD, POSITION: position_b1Q}
        self.rows.append(columns, group)
        self.excess.forget()

    def refill(self, survivors: Sequence[Survivors]) -> None:
        """Replaces the rows of some sequences by what survived, in pages of the exact size."""
        self.note_peak()
        self.rows.fill(survivors, self.stores.room)
        self.excess.forget()
        self.stores.limit(self.store, self.sequences.quota_BH)

    def keep(self, survivors: Survivors) -> None:
        """Leaves of some sequences only what survived; merged slots are written anew."""
        if self.rows.refills:
            self.refill([survivors])
        else:
            self.rows.retain(survivors)
            self.excess.forget()

    def count_step(self, evicted: bool) -> None:
        """Counts what the operator `decode_step` did."""
        everywhere = self.excess.step(evicted)
        self.rows.count_step(self.sequences.quota_R if evicted else None, everywhere)
        if evicted:
            self.evicted_at = self.columns_seen

    @property
    def key_width(self) -> int:
        """Channels of the model's keys; positions and counts may stand behind them."""
        return self.rows.columns[KEY].shape[0] - channels.extra(self.kind, self.recipe)

    @property
    def value_width(self) -> int:
        """Channels of values."""
        return self.rows.columns[VALUE].shape[0]

    @property
    def rotation(self) -> Rotation | None:
        """How keys turn with their position, where a policy needs it and they do."""
        return self.context.rotations[self.kind.index] if self.context.rotations else None

    # The ledger

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Adds the time of the block to a stage of the report."""
        device = None if self.rows.on_host else self.rows.device
        return self.context.ledger.meter.stage(stage, device)

    @property
    def bytes_held(self) -> int:
        """The storages of this layer, with what drafts attended to and queries that are kept."""
        pages = 0 if self.store is None else self.store.memory.nbytes
        return pages + self.sequences.nbytes + self.reads.nbytes

    def note_peak(self, more: int = 0) -> None:
        """To be called before this layer gives memory back, which now holds `more` bytes."""
        self.context.note_peak_at(self.columns_seen, more)
