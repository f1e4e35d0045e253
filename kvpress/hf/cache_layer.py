"""One layer of an engine cache, as transformers knows layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpress import host
from kvpress.errors import CacheError
from kvpress.hf.inline import Keys
from kvpress.hf.latent import UPDATED, joined
from kvpress.hf.refused import refuse_offloading, refuse_tensors
from kvpress.hf.selecting import batch_repeat_interleave, batch_select_indices, reorder_cache
from kvpress.ops.shapes import FLOATS
from kvpress.pipe.forward import run_layer
from kvpress.pipe.sharing import attend_again
from kvpress.pipe.state.channels import (
    biased,
    turned_back,
    turns,
    with_biases,
    with_positions,
    with_turns,
)
from kvpress.pipe.state.context import Context
from kvpress.pipe.state.crop import crop, is_croppable
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.types import LayerKind

TAG = "kvpress_layer"  # the attribute by which a returned key tensor names its cache layer


class EngineLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: answers transformers' layer contract and hands the tokens to its pipe.

    `update` returns the new keys and values only. The attention function finds this layer through
    the key tensor, attends over the store, and clears `waiting`.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, kind: LayerKind, context: Context) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = Layer(kind, context)
        self.is_sliding = kind.window is not None
        self.waiting: Tensor | None = None  # the values that wait for the attention function
        self.latents: Tensor | None = None  # the keys beside them, where attention sees others
        self._accepted: tuple[Any, ...] | None = None  # shapes of the last decode step

    # transformers sets them to None at first: a caller that looks must not take that for "empty".
    keys = values = property(refuse_tensors, lambda layer, value: None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pipe makes its store with the first tokens."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Takes keys and values `[B, H, Q, D]`; returns them tagged for the attention function.

        A model that computes attention by itself gets `Keys` instead, which attend in the end.
        """
        if self.state.kind.inline:
            return self._update_inline(key_states, value_states)
        if self.state.kind.latent:
            return self._update_latent(key_states, value_states)
        self.take(key_states, value_states)
        setattr(key_states, TAG, self)
        return key_states, value_states

    def take(self, key: Tensor, value: Tensor) -> None:
        """Notes the keys and values for which `attend` comes next. Raises CacheError."""
        self._check(key, value)
        self.is_initialized = True
        self.waiting = value

    def _update_latent(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Takes latents, and what turns: the model expands them before attention."""
        key = joined(latent, turned)
        self.take(key, latent)
        self.latents = key
        UPDATED.took(self)
        return latent, turned

    def _update_inline(self, key: Tensor, value: Tensor) -> tuple[Keys, Tensor]:
        copies = max(1, key.shape[1] // self.state.kind.heads)  # of a KV head, one per query head
        own_key, own_value = key[:, ::copies], value[:, ::copies]
        self.take(own_key, own_value)

        def attends(query: Tensor, valid_BQ: Tensor | None, scaling: float) -> Tensor:
            return self.attend(query, own_key, own_value, valid_BQ, scaling, 0.0)

        return Keys(key, self.state.kind.slopes is not None, attends), value

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
        """The attention output `[B, N, Q, D]` of the tokens that `update` took, once."""
        valid_BQ = None if valid_BQ is None else valid_BQ.cpu()
        shared = self.waiting is None and self.state.seen is not None
        tokens = self.taken(query, key, value, valid_BQ, (scaling, softcap, sink_N), shared)
        if shared:
            return turned_back(attend_again(self.state, tokens), self.state.recipe)
        if self.state.kind.readers:
            UPDATED.shared = True
        return turned_back(run_layer(self.state, tokens, valid_BQ), self.state.recipe)

    def taken(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid_BQ: Tensor | None,
        how: tuple[float, float, Tensor | None],
        shared: bool = False,
    ) -> Tokens:
        """The tokens that `update` took, with their queries, as the pipe takes them: once.

        how: scaling, cap and sinks. shared: their keys are those of an earlier layer.
        """
        if self.waiting is not value and not shared:
            again = "a second time" if self.waiting is None else "with other values"
            raise CacheError(
                f"Layer {self.state.kind.index} is attended to {again} in one forward pass: the"
                " model splits its attention or changes the values after the cache returned them,"
                " which this engine does not support. Use another model."
            )
        self.waiting = None
        tokens, slopes = Tokens(query, key, value, *how), self.state.kind.slopes
        tokens = with_turns(tokens, turns(self.state.recipe))
        if slopes is not None:
            tokens = with_positions(tokens, slopes, _seen_before(self.state, len(key)), valid_BQ)
        if biased(self.state.recipe):
            tokens = with_biases(tokens)
        return tokens

    def check_attended(self) -> None:
        """Raises CacheError if keys were taken that the engine's attention function never saw."""
        if self.waiting is None:
            return
        self.waiting = None
        raise CacheError(
            f"The keys of layer {self.state.kind.index} did not reach the engine's attention"
            " function: the engine is not attached to this model, or the model changes the keys"
            " after the cache returned them, which this engine does not support. Attach the engine"
            " with kvpress.attach(model, ...)."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical length after the new tokens, and offset 0: masks always cover everything seen."""
        return self.state.columns_seen + query_length, 0

    def get_seq_length(self) -> int:
        """The logical length: columns seen, padding included, whatever is stored."""
        return self.state.columns_seen

    def get_max_length(self) -> int:
        """The window of a sliding layer, else -1: no maximum."""
        return -1 if self.state.kind.window is None else self.state.kind.window

    get_max_cache_shape = get_max_length  # its name in older transformers

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take tokens back exactly."""
        return is_croppable(self.state)

    @property
    def record_past(self) -> bool:
        """Whether the tokens of a forward pass may be taken back until the next one."""
        return self.state.context.recording.on

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.state.context.recording.on = value

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first tokens."""
        return len(self.state.sequences) or -1

    def reset(self) -> None:
        """Forgets every token."""
        self.state.reset()
        self.waiting, self._accepted, self.is_initialized = None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens.

        Raises CacheError where that cannot be exact.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative"
                " integer, as transformers 5 does."
            )
        crop(self.state, -int(tokens_to_remove))  # transformers 5.16 counts in tensors

    reorder_cache = reorder_cache
    batch_repeat_interleave = batch_repeat_interleave
    batch_select_indices = batch_select_indices

    def select(self, index: list[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        self.state.select_sequences(index)
        self._accepted = None

    def become(self, state: Layer) -> None:
        """Holds another state from now on."""
        self.state, self.waiting, self._accepted = state, None, None
        self.is_initialized = state.store is not None

    offload = prefetch = refuse_offloading

    def _check(self, key: Tensor, value: Tensor) -> None:
        given = (key.shape, value.shape[3], key.dtype)
        if given == self._accepted:  # as usual: a decode step like the one before
            return
        _check_shapes(self.state, key, value)
        if key.shape[2] == 1 and self.state.store is not None:
            self._accepted = given


def tagged_layer(key: Tensor) -> EngineLayer | None:
    """The cache layer that returned this key tensor, if it is one of ours."""
    return getattr(key, TAG, None)


def _seen_before(state: Layer, batch: int) -> Tensor:
    """Real tokens that each of `batch` sequences has seen: int64, on the host."""
    return host.zeros(batch) if state.store is None else state.sequences.seen_B


def _check_shapes(state: Layer, key: Tensor, value: Tensor) -> None:
    """Raises CacheError for keys and values that a layer cannot take."""
    store, kind = state.store, state.kind
    if key.dtype not in FLOATS:
        raise CacheError(
            f"Layer {kind.index} got keys of {key.dtype}. Allowed: torch.float32,"
            " torch.bfloat16, torch.float16. Was the model changed while an engine is attached?"
        )
    allowed = (key.shape[0], kind.heads, key.shape[3], value.shape[3], key.dtype)
    if store is not None:
        widths = state.key_width, state.value_width
        allowed = (store.sequences, kind.heads, *widths, state.token_dtype)
    given = (*key.shape[:2], key.shape[3], value.shape[3], key.dtype)
    if given != allowed:
        raise CacheError(
            f"Layer {kind.index} got (batch, KV heads, key width, value width, dtype) ="
            f" {given}, but this cache holds {allowed}. Make a new cache with"
            " engine.new_cache() for another model or batch."
        )
