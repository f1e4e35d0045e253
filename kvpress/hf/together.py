"""One forward pass over texts of different ages: each row belongs to a cache of its own.

Projections and MLPs take all rows at once, which is what decoding many texts together saves. Only
attention is done for each text over what its own cache holds: so every policy, whatever it stores
and observes, does what it does for that text alone, and a text that fails fails alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpress.errors import CacheError
from kvpress.hf.cache import EngineCache
from kvpress.hf.cache_layer import TAG, EngineLayer
from kvpress.hf.foresight import look
from kvpress.hf.inline import Keys
from kvpress.hf.latent import UPDATED, joined
from kvpress.hf.spec import Lease
from kvpress.pipe.state.channels import turned_back
from kvpress.pipe.state.ids import columns_of
from kvpress.pipe.steps import run_layers

_Token = tuple[Tensor, Tensor, Tensor]  # query, key, value of one text
_How = tuple[float, float, Tensor | None]  # scaling, cap and sinks


class TogetherLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of several caches, as transformers knows layers.

    failed: which text failed in this pass, and why; its rows are zeros from there on.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, layers: Sequence[EngineLayer], failed: dict[int, Exception]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = layers[0].state  # whose kind is that of all
        self.is_sliding = self.state.kind.window is not None
        self.is_initialized = True
        self.waiting: Tensor | None = None
        self.latents: Tensor | None = None
        self._layers, self._failed = list(layers), failed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: every cache makes its own store."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Takes keys and values `[B, H, Q, D]`, row i for the i-th cache."""
        kind = self.state.kind
        if kind.inline:
            copies = max(1, key_states.shape[1] // kind.heads)
            key, value = key_states[:, ::copies], value_states[:, ::copies]

            def attends(query: Tensor, valid_BQ: Tensor | None, scaling: float) -> Tensor:
                self.waiting = value
                return self.attend(query, key, value, None, scaling, 0.0)

            return Keys(key_states, kind.slopes is not None, attends), value_states
        self.waiting = value_states
        if kind.latent:
            self.latents = joined(key_states, value_states)
            self.waiting = key_states
            UPDATED.took(self)
        else:
            setattr(key_states, TAG, self)
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid_BQ: Tensor | None,
        scaling: float,
        softcap: float,
        sink_N: Tensor | None = None,
    ) -> Tensor:
        """The attention output `[B, N, Q, E]`, each row over what its own cache holds."""
        takes, self.waiting = self.waiting is value, None
        own = list(zip(*(torch.split(x, 1) for x in (query, key, value)), strict=True))
        how = scaling, softcap, sink_N
        if takes and not self.state.kind.readers:
            found = self._run_together(own, how)
        else:
            found = self._run_one_by_one(own, how, takes)
        for number, out in found.items():
            if isinstance(out, Exception):  # of this text alone: the others go on
                self._failed[number] = out
        empty = query.new_zeros(1, *query.shape[1:3], value.shape[3])
        numbers = range(len(self._layers))
        return torch.cat([empty if n in self._failed else found[n] for n in numbers])

    def _run_together(self, own: list[_Token], how: _How) -> dict[int, Any]:
        """The outputs of all texts, in as few operator calls as they need; or their errors."""
        found: dict[int, Any] = {}
        tokens = {}
        for number, layer in enumerate(self._layers):
            if number in self._failed:
                continue
            try:
                query, key, value = own[number]
                layer.take(key, value)
                tokens[number] = layer.taken(query, key, value, None, how)
            except Exception as error:
                found[number] = error
        states = [self._layers[number].state for number in tokens]
        outputs = run_layers(states, list(tokens.values()))
        for number, state, out in zip(tokens, states, outputs, strict=True):
            found[number] = turned_back(out, state.recipe) if isinstance(out, Tensor) else out
        return found

    def _run_one_by_one(self, own: list[_Token], how: _How, takes: bool) -> dict[int, Any]:
        """The same where layers read keys of other layers."""
        found: dict[int, Any] = {}
        for number, layer in enumerate(self._layers):
            if number in self._failed:
                continue
            try:
                query, key, value = own[number]
                if takes:
                    layer.take(key, value)
                found[number] = layer.attend(query, key, value, None, *how)
            except Exception as error:
                found[number] = error
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all texts were as long as the longest; there are no masks."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """The length of the longest text: each token says its own position."""
        return max(layer.state.columns_seen for layer in self._layers)

    def get_max_length(self) -> int:
        """The window of a sliding layer, else -1: no maximum."""
        return -1 if self.state.kind.window is None else self.state.kind.window

    get_max_cache_shape = get_max_length  # its name in older transformers


class Together(Cache):
    """Engine caches of one text each, of which a pass takes one token each.

    Raises CacheError for caches that cannot go together. failed: the texts of the last pass that
    failed, by place, and why; their caches are not whole and must not be used again.
    """

    def __init__(self, caches: Sequence[EngineCache]) -> None:
        if len({id(cache) for cache in caches}) < len(caches):
            raise CacheError("A cache is given twice: it takes one token in a pass.")
        for cache in caches:
            if cache.beside or cache.batch_size != 1 or not cache.columns_seen:
                raise CacheError(
                    "Only caches that hold the keys and values of one text, and nothing else, can"
                    f" decode together; this one has batch={cache.batch_size},"
                    f" {cache.columns_seen} tokens, of {cache.fingerprint}."
                )
        self.caches, self.failed = list(caches), dict[int, Exception]()
        every = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[TogetherLayer(own, self.failed) for own in every])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values of one layer, row i for the i-th cache."""
        layer: Any = self.layers[layer_idx]
        taken: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return taken

    def begin(self, lease: Lease, given: Mapping[str, Any] | None) -> None:
        """To be called before a module runs. given: its arguments, before the first layer.

        Raises CacheError unless the caches are whole, and of the engine that is attached.
        """
        if any(cache.spec.lease is not lease for cache in self.caches):
            raise CacheError(
                "A cache of this batch was made by another engine than the one that is attached."
            )
        if given is None:
            return
        self.failed.clear()
        for cache, own in zip(self.caches, torch.split(given["input_ids"], 1), strict=True):
            cache.check_whole()
            cache.context.recording.announce(None)
            look(cache, {"input_ids": own})

    def end(self, given: Mapping[str, Any]) -> None:
        """To be called behind the last layer. Raises CacheError where layers did not attend."""
        every = torch.split(columns_of(given["input_ids"], None), 1)
        for number, (cache, own) in enumerate(zip(self.caches, every, strict=True)):
            if number in self.failed:
                continue
            if cache.columns_seen != cache.ids.columns + 1:
                raise CacheError("The pass ended before the layers had attended.")
            cache.ids.append(own)
