"""Attention within chunks (Llama 4): a token sees those of its own chunk of the text.

No policy compresses such a layer: it keeps less than a chunk. Its attention, and the mask that it
asks for, are transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin

_TAG = "kvpress_chunked"  # the attribute of keys by which attention knows them
_OWN = "sdpa"


class ChunkedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The last tokens of a layer, fewer than a chunk has; while drafts may go, more.

    columns: keys and values `[B, H, S, D]`.
    """

    is_compileable = False
    supports_early_init = False
    is_sliding = True
    is_croppable = True
    COPIED = ("columns", "seen", "is_initialized")

    def __init__(self, chunk: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chunk, self.record_past = chunk, False
        self.forget()

    def forget(self) -> None:
        """Forgets every token."""
        self.columns: dict[int, Tensor | None] = {0: None, 1: None}
        self.seen, self.is_initialized = 0, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: tensors are made with the first tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes keys and values; returns all that new tokens may see, with a mark."""
        self.seen += key_states.shape[2]
        self.is_initialized = True
        given = (key_states, value_states)
        most, held = self.chunk - 1 + key_states.shape[2], []
        for i, new in enumerate(given):
            old = self.columns[i]
            every = new if old is None else torch.cat([old, new], dim=2)
            held.append(every[:, :, -most:])
            kept = every if self.record_past else every[:, :, 1 - self.chunk :]
            self.columns[i] = kept.clone() if kept.shape[2] < every.shape[2] else kept
        key, value = held
        setattr(key, _TAG, True)
        return key, value

    def trim(self, tokens: int) -> None:
        """Takes back the last tokens, and lets go of what was kept for that."""
        self.seen -= tokens
        for i, held in self.columns.items():
            if held is not None:
                end = held.shape[2] - tokens
                self.columns[i] = held[:, :, max(0, end + 1 - self.chunk) : end].clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys new tokens may see, and at which column these begin."""
        held = min(self.seen, self.chunk - 1)
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """The size of a chunk."""
        return self.chunk

    get_max_cache_shape = get_max_length  # its name in older transformers


def is_chunked(key: Tensor) -> bool:
    """Whether such a layer returned these keys."""
    return getattr(key, _TAG, False)


def attend(module: Any, states: tuple[Tensor, Tensor, Tensor], mask: Any, **given: Any) -> Any:
    """transformers' own attention."""
    functions: Any = AttentionInterface
    return functions()[_OWN](module, *states, mask, **given)


def asks_for_chunks(given: dict[str, Any]) -> bool:
    """Whether a mask is asked for, by the arguments of its function, for such layers."""
    config = given.get("config")
    chunk = getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None) or ()
    return "chunked_attention" in types and given.get("local_size") == chunk is not None


def mask(*args: Any, **given: Any) -> Tensor | None:
    """transformers' own mask `[B, 1, Q, S]`, bool."""
    masks: Any = AttentionMaskInterface
    made: Tensor | None = masks()[_OWN](*args, **given)
    return made
