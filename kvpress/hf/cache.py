"""A transformers `Cache` whose layers hold ragged rows and a logical length."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.rotation import Rotation
from kvpress.hf import cache_file
from kvpress.hf.cache_layer import EngineLayer
from kvpress.hf.compat import uncompiled
from kvpress.hf.spec import Lease
from kvpress.hf.support import Fingerprint
from kvpress.pipe.drafts import commit
from kvpress.pipe.state import snapshot
from kvpress.pipe.state.context import Run
from kvpress.pipe.state.ids import SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.meter import Meter
from kvpress.pipe.state.remarks import remarks
from kvpress.policy.recipe import Recipe
from kvpress.policy.sparsity import Thresholds
from kvpress.report import Report


class EngineCache(Cache):
    """A compressed cache.

    Made by `engine.new_cache()`; goes where transformers takes a `cache` (before 5.24:
    `past_key_values`).
    """

    def __init__(
        self,
        shape: Fingerprint,
        recipe: Recipe,
        page_slots: int,
        horizon: int | None,
        lease: Lease | None = None,
        cache_dtype: torch.dtype | None = None,
        rotations: Sequence[Rotation | None] = (),
        thresholds: Thresholds | None = None,
    ) -> None:
        self.fingerprint, self.recipe = shape, recipe
        self.meter = Meter()
        self.notes: dict[str, None] = {}
        compressed = sum(kind.window is None for kind in shape.kinds)
        run = Run(
            recipe,
            compressed,
            page_slots,
            horizon or DEFAULT_HORIZON,
            self.meter,
            self.notes,
            cache_dtype,
            rotations=tuple(rotations),
            thresholds=thresholds,
        )
        self._engine_layers = [EngineLayer(kind, run) for kind in shape.kinds]
        run.members = self.states
        super().__init__(layers=list(self._engine_layers))
        self._run, self._horizon, self.lease = run, horizon, lease or Lease()
        self._latest: EngineLayer | None = None  # that took keys
        self.ids = SeenIds()
        self.spread: Tensor | None = None  # how the running pass is to be repeated; see twins.py
        if recipe.limits and compressed < len(shape.kinds):
            window = max(kind.window or 0 for kind in shape.kinds)
            self.notes[
                f"{len(shape.kinds) - compressed} of {len(shape.kinds)} layers are sliding-window"
                f" layers: they keep their window ({window} tokens) and are not compressed by the"
                " policy."
            ] = None
        self._standing_notes = dict(self.notes)

    def expect(self, new_tokens: int) -> None:
        """Says how many tokens the caller will decode: the horizon of policies with a schedule."""
        self._run.horizon = self._horizon = max(1, new_tokens)

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
        if not self.lease.active:
            raise CacheError(
                "The engine that made this cache is not attached to this model any more. Attach it"
                " again and make a new cache with engine.new_cache()."
            )
        self.check_attended()
        self._latest = self._engine_layers[layer_idx]
        return self._latest.update(key_states, value_states)

    def select(self, index: list[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was, in every layer."""
        for layer in self._engine_layers:
            layer.select(index)
        self.ids.select(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        self.select([b for b in range(max(0, self.batch_size)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at `indices` (integers, or one boolean per sequence)."""
        if self.batch_size > 0:
            chosen = torch.arange(self.batch_size, device="cpu")
            self.select(chosen[torch.as_tensor(indices, device="cpu")].tolist())

    def note_ids(self, given: Mapping[str, Any]) -> None:
        """Keeps the ids of a forward pass that is done, by its arguments, once.

        The model inside another knows them first, where it is called.
        """
        if self.ids.columns == self.columns_seen:
            return
        tokens, mask = given.get("input_ids"), given.get("attention_mask")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        plain = isinstance(mask, Tensor) and mask.dim() == 2
        if tokens is not None:
            self.ids.append(tokens, mask if plain else None)

    def become(self, empty: Cache) -> EngineCache:
        """This cache as the caller's own object, which was empty; its copies then are copies of it.

        transformers fills the caches of a caller in place. So an empty one turns into an engine
        cache where it stands: whoever holds it holds what was read.
        """
        empty.__class__ = type(self)
        vars(empty).clear()
        vars(empty).update(vars(self))
        return cast(EngineCache, empty)

    def unshare(self) -> None:
        """Gives every sequence pages of its own; what beams and forks shared is copied."""
        for state in self.states:
            state.unshare()

    def begin(self) -> None:
        """Undoes what a forward pass that raised before its first layer left behind.

        Raises CacheError if it got further than that.
        """
        if self._latest is not None:
            self._latest.waiting = None
        kinds, self.spread = self.spread, None
        if kinds is not None:
            self.select(kinds.tolist())
        self.check_whole()

    def kinds_of_sequences(self, batch: int) -> Tensor:
        """A number for each of `batch` sequences, the same for those that hold the same pages."""
        states = [state for state in self.states if state.store is not None]
        kinds: dict[Any, int] = {}
        keys = zip(*(state.contents() for state in states), strict=True)
        numbers = [kinds.setdefault(key, len(kinds)) for key in keys] if states else [0] * batch
        return host.tensor(numbers)

    def check_attended(self) -> None:
        """Raises CacheError if keys were taken that the engine's attention function never saw."""
        layer = self._latest  # each update checks the one before it
        if layer is None or layer.waiting is None:
            return
        layer.waiting = None
        raise CacheError(
            f"The keys of layer {layer.state.kind.index} did not reach the engine's attention"
            " function: the engine is not attached to this model, or the model changes the keys"
            " after the cache returned them, which this engine does not support. Attach the engine"
            " with kvpress.attach(model, ...)."
        )

    @property
    def columns_seen(self) -> int:
        """The logical length: columns of the batch, padding included."""
        return self.states[0].columns_seen

    def check_whole(self) -> None:
        """Raises CacheError if an interrupted forward pass left layers of different lengths."""
        lengths = {state.columns_seen for state in self.states}
        if len(lengths) > 1 or self._run.broken is not None:
            raise CacheError(
                f"The layers of this cache have seen {sorted(lengths)} tokens: a forward pass was"
                " interrupted. Its contents are lost: call reset() or make a new cache."
            )

    def reset(self) -> None:
        """Forgets every token, and what was said about tokens to come."""
        super().reset()  # type: ignore[no-untyped-call]
        self._latest = self.spread = None
        self.ids.clear()
        self.notes.clear()
        self.notes.update(self._standing_notes)
        run = self._run
        run.recording, run.announced = False, None
        run.broken = run.newest = None
        run.bytes_peak = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens of every layer, or of none at all."""
        self.check_whole()
        for state in self.states:
            state.check_crop(max(0, -int(tokens_to_remove)))
        super().crop(tokens_to_remove)
        self.ids.crop(max(0, -int(tokens_to_remove)))

    def activate_past_recording(self) -> None:
        """From now on tokens may be taken back by `crop` until the next forward pass.

        What they would evict is evicted then. Assisted and prompt-lookup decoding call this.
        """
        self._run.recording = True

    def stop_past_recording(self) -> None:
        """Tokens are final again, those that could still be taken back as well."""
        self.check_whole()
        for state in self.states:
            commit(state)
        self._run.recording = False

    def announce(self, logits_to_keep: Any) -> None:
        """Says how many of the last tokens of the coming forward pass the caller will judge.

        All but the first of them are drafted, while tokens are recorded. None or 0: not known.
        """
        known = isinstance(logits_to_keep, int) and logits_to_keep > 0
        self._run.announced = logits_to_keep - 1 if known else None

    def fork(self) -> EngineCache:
        """A cache that goes on from here on its own.

        Both share the pages; what one of them changes it copies first. Several questions about one
        context cost its bytes once.
        """
        self.check_whole()
        other = EngineCache(
            self.fingerprint,
            self.recipe,
            self._run.page_slots,
            self._horizon,
            self.lease,
            self._run.cache_dtype,
            self._run.rotations,
            self._run.thresholds,
        )
        other.notes.update(self.notes)
        for name in ("horizon", "recording"):
            setattr(other._run, name, getattr(self._run, name))
        other.ids = self.ids.copy()
        for ours, theirs in zip(self._engine_layers, other._engine_layers, strict=True):
            theirs.state = ours.state.fork(other._run)
            theirs.is_initialized = ours.is_initialized
        other._run.members = other.states
        return other

    def __getitem__(self, layer: int) -> NoReturn:
        """Refused: rows are of different lengths and lie in pages."""
        raise CacheError(
            "An engine cache has no keys and values by layer: what it keeps lies in pages, row by"
            " row. Ask it with kept_positions(layer, sequence, head), report() or get_seq_length()."
        )

    def __iter__(self) -> Any:
        """Refused, as indexing is."""
        return self[0]

    def __copy__(self) -> EngineCache:
        """A cache that goes on by itself: two that share their layers would spoil each other."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCache:
        other = memo[id(self)] = EngineCache.__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "A compressed cache cannot be pickled (pickle, torch.save, another process): it belongs"
            " to an engine on a model. Use cache.save(path), and engine.load_cache(path) where it"
            " is to go on; copy.deepcopy(cache) and cache.fork() copy it."
        )

    def save(self, path: str | Path) -> None:
        """Writes the cache to a safetensors file, whole or not at all.

        `engine.load_cache` reads it. The file names the model as it is now: save before adapters
        or weights change. Tokens that could still be taken back become final. Raises CacheError if
        a forward pass was interrupted, the engine is gone or the model has weights that show no
        bytes, CacheFileError if the file cannot be written.
        """
        self.check_whole()
        facts = {**self._facts(), "settings": self._settings()}
        cache_file.save(path, self.states, self.ids, facts)

    def load(self, path: str | Path, devices: Mapping[int, torch.device]) -> None:
        """Becomes what another cache was when it was saved; see `engine.load_cache`.

        devices: where the layers of the model are. Raises CacheFileError; nothing changes then.
        """
        contents = cache_file.read(path, self._facts())
        kinds = self.fingerprint.kinds
        restored = snapshot.restore(path, contents, kinds, self._run, devices)
        settings = contents.facts["settings"]
        self._run, self.ids, self._latest = restored.run, restored.ids, None
        self._horizon = settings["horizon"]
        self._run.horizon = self._horizon or DEFAULT_HORIZON
        self.notes.update(dict.fromkeys(settings["notes"]))
        for layer, state in zip(self._engine_layers, restored.layers, strict=True):
            layer.state, layer.waiting = state, None
            layer.is_initialized = state.store is not None

    def _facts(self) -> dict[str, str]:
        """What a file and its reader must agree on."""
        return {
            "model": str(self.fingerprint),
            "weights": self.lease.weights(),
            "policy": str(self.recipe),
        }

    def _settings(self) -> dict[str, Any]:
        """What a saved cache needs besides its layers, as plain values."""
        dtype = self._run.cache_dtype
        return {
            "horizon": self._horizon,
            "page_slots": self._run.page_slots,
            "cache_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "notes": list(self.notes),
            "ended": self.ids.ended,
        }

    def kept_positions(self, layer: int, sequence: int = 0, head: int = 0) -> list[int]:
        """The sorted logical positions that one row still holds. Padding has no position."""
        bounds = (
            (layer, len(self.layers), "layer"),
            (sequence, len(self.states[0].seen_B), "sequence"),
        )
        for given, limit, name in bounds:
            self._check_index(given, limit, name)
        self._check_index(head, self.fingerprint.kinds[layer].heads, "head")
        return self.states[layer].kept_positions(sequence, head)

    @staticmethod
    def _check_index(given: int, limit: int, name: str) -> None:
        if not 0 <= given < limit:
            raise CacheError(f"{name}={given} does not exist: allowed are 0 to {limit - 1}.")

    def report(self, model: str = "") -> Report:
        """The ledger: slots and bytes per layer, seconds per stage, and notes."""
        layers = [state.report() for state in self.states]
        self._run.note_peak()
        notes = list(self.notes)
        if self._horizon is None and any(
            p.horizon is None for p in self.recipe.policies if hasattr(p, "horizon")
        ):
            notes.append(
                "The number of new tokens was not known: schedules used a horizon of"
                f" {DEFAULT_HORIZON}. Use engine.generate(), engine.new_cache(max_new_tokens=...)"
                " or the policy's option horizon."
            )
        notes += remarks(self.states, layers)
        return Report(
            model=model or self.fingerprint.model_type,
            policy=str(self.recipe),
            tokens_seen=self.states[0].seen_B.tolist(),
            layers=layers,
            bytes_held=sum(layer.bytes_held for layer in layers),
            bytes_full=sum(layer.bytes_full for layer in layers),
            bytes_shared=sum(layer.bytes_shared for layer in layers),
            bytes_ids=self.ids.nbytes,
            bytes_peak=self._run.bytes_peak,
            stages=self.meter.seconds(),
            notes=notes,
        )

    def check_integrity(self) -> bool:
        """True if the store of every layer is consistent. Raises CacheError otherwise."""
        return all(
            state.store.check_integrity() for state in self.states if state.store is not None
        )

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take any tokens back exactly."""
        return all(state.is_croppable for state in self.states)

    @property
    def states(self) -> list[Layer]:
        """The state of every layer."""
        return [layer.state for layer in self._engine_layers]


_update_uncompiled = uncompiled(EngineCache.update)

DEFAULT_HORIZON = 256  # new tokens assumed by schedules when nobody said how many will be generated
