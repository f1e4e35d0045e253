"""The attention function that an attached model calls, registered with transformers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpress.errors import CacheError, UnsupportedModelError
from kvpress.formulas.attention import prompt_attention
from kvpress.hf.cache_layer import tagged_layer
from kvpress.hf.compat import uncompiled
from kvpress.hf.masks import refuse_mask
from kvpress.hf.support import refuse_options
from kvpress.types import EMPTY, LayerKind

# Arguments that would change the result, and that nobody here looks at.
_REFUSED = frozenset(
    {
        "position_bias",
        "s_aux",  # learned sinks
        "sinks",
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `[B, N, Q, D]` queries in, `[B, Q, N, D]` out.

    Keys that an engine cache returned are attended from its store; without a cache attention is
    dense.
    """
    if torch.compiler.is_dynamo_compiling():
        states, options = (query, key, value), (softcap, sliding_window, is_causal)
        return _attention_uncompiled(
            module, *states, attention_mask, scaling, dropout, *options, **kwargs
        )
    if dropout or not _REFUSED.isdisjoint(kwargs):
        _check_options(module, dropout, kwargs)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} is not causal; only causal attention is supported."
        )
    if attention_mask is not None and (
        attention_mask.dim() != 2 or attention_mask.dtype != torch.bool
    ):
        refuse_mask(attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = tagged_layer(key)
    if layer is not None:
        if layer.state.kind.window != sliding_window:
            _refuse_window(layer.state.kind, sliding_window)
        out = layer.attend(query, key, value, attention_mask, scale, softcap or 0.0)
    elif key.shape[2] == query.shape[2]:
        out = _dense(query, key, value, attention_mask, scale, softcap or 0.0, sliding_window)
    else:
        raise CacheError(
            f"{type(module).__name__} attends to {key.shape[2]} keys that did not come from an"
            " engine cache while the engine is attached. Pass past_key_values=engine.new_cache(),"
            " or none at all, and do not change the keys after the cache returned them."
        )
    return out.transpose(1, 2).contiguous(), None


def _refuse_window(kind: LayerKind, window: int | None) -> NoReturn:
    raise UnsupportedModelError(
        f"Layer {kind.index} attends with sliding_window={window}, but its config says"
        f" {kind.window}. The layer kinds of this model cannot be read."
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
) -> Tensor:
    """Attention without a cache."""
    if valid_BQ is None:
        return prompt_attention(query, key, value, None, scale, softcap, window)
    column_Q = torch.arange(key.shape[2], device=key.device)
    position_BQ = column_Q.where(valid_BQ, EMPTY)
    position_BHQ = position_BQ[:, None].expand(-1, key.shape[1], -1)
    out = prompt_attention(query, key, value, position_BHQ, scale, softcap, window)
    return out.masked_fill(~valid_BQ[:, None, :, None], 0.0)
