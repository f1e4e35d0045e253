"""transformers and the engine as rivals: each has a model of its own that shares the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvpress.bench.prompt import reference_prompt
from kvpress.bench.run import PromptError
from transformers import DynamicCache

import kvpress
from kvpress.attachment import cache_name

BASELINE = "transformers"  # its DynamicCache with SDPA
FULL = "full"  # the engine without compression


@dataclass(frozen=True)
class Candidate:
    """A model, where its empty caches come from, and by which name it takes them."""

    model: Any
    new_cache: Callable[[], Any]
    cache_name: str

    def forward(self, ids_BP: torch.Tensor, cache: Any) -> torch.Tensor:
        """The logits `[B, 1, V]` after the last of some new tokens, which the cache takes."""
        out = self.model(ids_BP, logits_to_keep=1, **{self.cache_name: cache})
        logits: torch.Tensor = out.logits
        return logits


def candidate(
    model: Any, name: str, cache_dtype: torch.dtype | None = None, new_tokens: int | None = None
) -> Candidate:
    """`BASELINE`, or the engine with the policy `name`, on a copy of the model.

    The copy shares the weights; it has its own config, which attaching changes. new_tokens: what
    schedules of a policy should expect. Raises what `kvpress.attach` raises.
    """
    own = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    if name == BASELINE:
        own.set_attn_implementation("sdpa")
        return Candidate(own, partial(DynamicCache, config=own.config), cache_name(own))
    engine = kvpress.attach(own, name, cache_dtype=cache_dtype)
    return Candidate(own, partial(engine.new_cache, new_tokens), cache_name(own))


def held(cache: Any) -> int:
    """Bytes of a cache of either kind."""
    if isinstance(cache, DynamicCache):
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return int(cache.report().bytes_held)


def prompt_ids(model: Any, tokenizer: Any, tokens: int, new_tokens: int) -> torch.Tensor:
    """About `tokens` tokens of the reference prompt, `[1, P]`, on the model's device.

    Raises PromptError where they and `new_tokens` more exceed the model's positions.
    """
    text = reference_prompt(tokenizer, tokens)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + new_tokens > limit:
        raise PromptError(
            f"A prompt of {ids.shape[1]} tokens and {new_tokens} new ones exceed the model's"
            f" {limit} positions. Lower --tokens, or take another model."
        )
    return ids
