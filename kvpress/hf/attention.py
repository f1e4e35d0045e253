"""The attention function that an attached model calls, registered with transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress.errors import CacheError, UnsupportedModelError
from kvpress.formulas.attention import prompt_attention
from kvpress.hf.asking import answer
from kvpress.hf.cache_layer import EngineLayer, tagged_layer
from kvpress.hf.chunked import attend, is_chunked
from kvpress.hf.compat import uncompiled
from kvpress.hf.latent import UPDATED, from_latents, to_latents
from kvpress.hf.masks import refuse_mask
from kvpress.hf.support import refuse_options
from kvpress.types import EMPTY, LayerKind

# Arguments that would change the result, and that nobody here looks at.
_REFUSED = frozenset(
    {
        "position_bias",
        "sinks",  # of every token
        "indices",  # of tokens that an indexer chose
        "block_indices",
        "head_mask",
        "output_attentions",
    }
)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `[B, N, Q, D]` queries in, `[B, Q, N, D]` out.

    Keys that an engine cache returned are attended from its store; without a cache attention is
    dense. s_aux: learned sinks, one for each query head.
    """
    if torch.compiler.is_dynamo_compiling():
        states, options = (query, key, value), (softcap, sliding_window, is_causal)
        return _attention_uncompiled(
            module, *states, attention_mask, scaling, dropout, *options, s_aux=s_aux, **kwargs
        )
    answer(query, key)
    _check(module, dropout, is_causal, kwargs)
    if is_chunked(key):
        given = {"scaling": scaling, "is_causal": is_causal, **kwargs}
        own: tuple[Tensor, None] = attend(module, (query, key, value), attention_mask, **given)
        return own
    if attention_mask is not None and (
        attention_mask.dim() != 2 or attention_mask.dtype != torch.bool
    ):
        refuse_mask(attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is not None and softcap:
        refuse_options(type(module).__name__, "a cap on logits and learned sinks")
    how = _How(attention_mask, scale, softcap or 0.0, sliding_window, s_aux)
    return _attend(module, query, key, value, how).transpose(1, 2).contiguous(), None


class _How(NamedTuple):
    """How a layer attends. valid_BQ: which of the new tokens are real; None: all."""

    valid_BQ: Tensor | None
    scaling: float
    softcap: float
    window: int | None
    sink_N: Tensor | None


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
    """The attention output `[B, N, Q, E]`, over what an engine cache holds if the keys are its."""
    layer = tagged_layer(key)
    latents = UPDATED.take() if layer is None else None
    if latents is not None:
        return _attend_latents(module, latents, query, how)
    if layer is not None:
        _check_kind(module, layer.state.kind, how)
        rest = (how.valid_BQ, how.scaling, how.softcap, how.sink_N)
        return layer.attend(query, key, value, *rest)
    if UPDATED.shared and getattr(module, "is_kv_shared_layer", False):
        raise CacheError(
            f"{type(module).__name__} reads keys of an earlier layer that were moved to another"
            " device, where the engine does not know them. Load the model onto one device."
        )
    if key.shape[2] == query.shape[2]:
        return _dense(query, key, value, *how)
    raise CacheError(
        f"{type(module).__name__} attends to {key.shape[2]} keys that did not come from an"
        " engine cache while the engine is attached. Pass past_key_values=engine.new_cache(),"
        " or none at all, and do not change the keys after the cache returned them."
    )


def _attend_latents(module: Any, layer: EngineLayer, query: Tensor, how: _How) -> Tensor:
    """The attention output `[B, N, Q, E]` of latents that an engine cache took just before."""
    kind, key, value, layer.latents = layer.state.kind, layer.latents, layer.waiting, None
    other = kind.index != getattr(module, "layer_idx", None)
    if other or key is None or value is None or key.shape[2] != query.shape[2]:
        raise CacheError(
            f"{type(module).__name__} attends, but layer {kind.index} has taken latents that wait"
            " for attention. A pass was interrupted: make a new cache."
        )
    _check_kind(module, kind, how)
    own = to_latents(module, query, kind.latent)
    rest = (how.valid_BQ, how.scaling, how.softcap, how.sink_N)
    return from_latents(module, layer.attend(own, key, value, *rest))


def _check(module: Any, dropout: float, is_causal: bool | None, options: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for what would change attention in a way unknown here."""
    if dropout or not _REFUSED.isdisjoint(options):
        _check_options(module, dropout, options)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} is not causal; only causal attention is supported."
        )


def _check_kind(module: torch.nn.Module, kind: LayerKind, how: _How) -> None:
    """Raises UnsupportedModelError where a layer attends otherwise than the model has shown."""
    if kind.window != how.window:
        raise UnsupportedModelError(
            f"Layer {kind.index} attends with sliding_window={how.window}, but its config says"
            f" {kind.window}. The layer kinds of this model cannot be read."
        )
    if kind.sink == (how.sink_N is not None):
        return
    if not kind.sink:
        refuse_options(type(module).__name__, "s_aux")
    raise UnsupportedModelError(
        f"Layer {kind.index} has learned attention sinks, but {type(module).__name__} does not give"
        " them to its attention function as s_aux. Use a model that does."
    )


_attention_uncompiled = uncompiled(attention)


def _check_options(module: torch.nn.Module, dropout: float, options: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for options that change attention in a way unknown here."""
    asked = (x for x in _REFUSED & options.keys() if options[x] is not None)
    given = sorted(x for x in asked if options[x] is not False)
    if given or dropout:
        refuse_options(type(module).__name__, ", ".join(given) or f"dropout={dropout}")


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_BQ: Tensor | None,
    scale: float,
    softcap: float,
    window: int | None,
    sink_N: Tensor | None,
) -> Tensor:
    """Attention without a cache."""
    if valid_BQ is None:
        return prompt_attention(query, key, value, None, scale, softcap, window, sink_N)
    column_Q = torch.arange(key.shape[2], device=key.device)
    position_BQ = column_Q.where(valid_BQ, EMPTY)
    position_BHQ = position_BQ[:, None].expand(-1, key.shape[1], -1)
    out = prompt_attention(query, key, value, position_BHQ, scale, softcap, window, sink_N)
    return out.masked_fill(~valid_BQ[:, None, :, None], 0.0)
