"""A transformers `Cache` whose layers hold ragged rows and a logical length."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpress.errors import CacheError
from kvpress.hf import cache_report, keeping
from kvpress.hf.cache_layer import EngineLayer
from kvpress.hf.compat import uncompiled
from kvpress.hf.refused import refuse_pickling, refuse_tensors
from kvpress.hf.selecting import batch_repeat_interleave, batch_select_indices, reorder_cache
from kvpress.hf.spec import CacheSpec
from kvpress.hf.states import place_layers
from kvpress.host import lasting
from kvpress.pipe.drafts import commit
from kvpress.pipe.state.crop import check_crop, is_croppable
from kvpress.pipe.state.ids import SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.snapshot import Restored
from kvpress.report import Report


class EngineCache(Cache):
    """A compressed cache.

    Made by `engine.new_cache()`; goes where transformers takes a `cache` (before 5.24:
    `past_key_values`).
    """

    def __init__(self, spec: CacheSpec, horizon: int | None) -> None:
        self.spec, self.fingerprint, self.horizon = spec, spec.fingerprint, horizon
        self.context = spec.context(horizon)
        every, self._engine_layers, self.beside = place_layers(spec.fingerprint, self.context)
        self.context.layers = list(self.states)
        super().__init__(layers=every)
        self.latest: EngineLayer | None = None  # that took keys
        self.outer: dict[str, Any] | None = None  # arguments of the pass of the whole model
        self.ids = SeenIds()
        spec.note(self)
        self.repeats: Tensor | None = None  # how the running pass is to be repeated; see dedup.py

    @property
    def states(self) -> list[Layer]:
        """The state of every layer with keys and values."""
        return [layer.state for layer in self._engine_layers]

    @property
    def columns_seen(self) -> int:
        """The logical length: columns of the batch, padding included."""
        return self._engine_layers[0].state.columns_seen

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, states, and the ids that were seen."""
        held = sum(state.bytes_held for state in self.states)
        return held + self.beside.nbytes + self.ids.nbytes

    def expect(self, new_tokens: int) -> None:
        """Says how many tokens the caller will decode: the horizon of policies with a schedule."""
        self.context.horizon = self.horizon = max(1, new_tokens)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values of one layer. Raises CacheError for another model's."""
        if torch.compiler.is_dynamo_compiling():  # free otherwise; a decorator costs a microsecond
            return _update_uncompiled(self, key_states, value_states, layer_idx)
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"Layer {layer_idx} does not exist in this cache of {self.fingerprint}. Make a"
                " cache with engine.new_cache() of the engine attached to this model."
            )
        if not self.spec.lease.active:
            raise CacheError(
                "The engine that made this cache is not attached to this model any more. Attach it"
                " again and make a new cache with engine.new_cache()."
            )
        if self.latest is not None:
            self.latest.check_attended()
        layer: Any = self.layers[layer_idx]
        self.latest = layer if isinstance(layer, EngineLayer) else None
        taken: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return taken

    def check_whole(self) -> None:
        """Raises CacheError if an interrupted forward pass left layers of different lengths."""
        lengths = {state.columns_seen for state in self.states}
        if len(lengths) > 1 or self.context.dirty is not None or self.beside.torn:
            raise CacheError(
                f"The layers of this cache have seen {sorted(lengths)} tokens: a forward pass was"
                " interrupted. Its contents are lost: call reset() or make a new cache."
            )

    def select(self, index: list[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was, in every layer."""
        for layer in self._engine_layers:
            layer.select(index)
        self.beside.select(index)
        self.ids.select(index)
        self.context.select(index)

    reorder_cache = reorder_cache
    batch_repeat_interleave = batch_repeat_interleave
    batch_select_indices = batch_select_indices

    def unshare(self) -> None:
        """Gives every sequence pages of its own; what beams and forks shared is copied."""
        for state in self.states:
            state.unshare()

    def reset(self) -> None:
        """Forgets every token, and what was said about tokens to come."""
        for layer in self._engine_layers:
            layer.reset()
        self.beside.clear()
        self.latest = self.repeats = self.outer = None
        self.ids.clear()
        self.context.begin(self.spec.notes())

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens of every layer, or of none at all."""
        self.check_whole()
        tokens = max(0, -int(tokens_to_remove))
        self.beside.check_crop(tokens)
        for state in self.states:
            check_crop(state, tokens)
        for layer in self._engine_layers:
            layer.crop(tokens_to_remove)
        self.beside.crop(tokens)
        self.ids.crop(tokens)

    @property
    def is_initialized(self) -> bool:
        """Whether tokens were fed."""
        return all(layer.is_initialized for layer in self._engine_layers)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take any tokens back exactly."""
        return self.beside.croppable and all(is_croppable(state) for state in self.states)

    def activate_past_recording(self) -> None:
        """From now on tokens may be taken back by `crop` until the next forward pass.

        What they would evict is evicted then. Assisted and prompt-lookup decoding call this.
        """
        self.context.recording.on = True
        self.beside.record(True)

    def stop_past_recording(self) -> None:
        """Tokens are final again, those that could still be taken back as well."""
        self.check_whole()
        for state in self.states:
            commit(state)
        self.context.recording.on = False
        self.beside.record(False)

    def fork(self) -> EngineCache:
        """A cache that goes on from here on its own.

        Both share the pages; what one of them changes it copies first. Several questions about one
        context cost its bytes once.
        """
        self.check_whole()
        other = EngineCache(self.spec, self.horizon)
        other.context.go_on_from(self.context)
        other.ids = self.ids.copy()
        for ours, theirs in zip(self._engine_layers, other._engine_layers, strict=True):
            theirs.become(ours.state.fork(other.context))
        other.beside.copy_from(self.beside)
        other.context.layers = list(other.states)
        return other

    __getitem__ = __iter__ = refuse_tensors
    __copy__ = fork  # two that share their layers would spoil each other

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCache:
        other = memo[id(self)] = EngineCache.__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    __reduce_ex__ = refuse_pickling

    save = keeping.save
    load = keeping.load
    contents = keeping.contents
    restore = keeping.restore

    def take_over(self, found: Restored, devices: keeping.Devices, path: str | Path) -> None:
        """Holds what a file, or what was put aside, has given. devices: where layers are."""
        beside = self.beside.restored(found.beside, found.layers[0], devices, path)
        self.context, self.ids, self.horizon = found.context, found.ids, found.horizon
        self.spec = replace(
            self.spec, page_slots=found.context.page_slots, cache_dtype=found.context.cache_dtype
        )
        self.latest = None
        for layer, state in zip(self._engine_layers, found.layers, strict=True):
            layer.become(state)
        self.beside.copy_from(beside)

    def kept_positions(self, layer: int, sequence: int = 0, head: int = 0) -> list[int]:
        """The sorted logical positions that one row of a layer still holds; padding has none."""
        return cache_report.kept_positions(self.states, layer, sequence, head)

    def report(self, model: str = "") -> Report:
        """The ledger: slots and bytes per layer, seconds per stage, and notes."""
        name, held = model or self.fingerprint.model_type, (self.states, self.ids)
        return cache_report.report(name, self.context, self.horizon, *held, self.beside.nbytes)

    def check_integrity(self) -> bool:
        """True if the store of every layer is consistent. Raises CacheError otherwise."""
        stores = [state.store for state in self.states if state.store is not None]
        return all(store.check_integrity() for store in stores)


_update_uncompiled = uncompiled(EngineCache.update)
