"""Attaching to a transformers model through its official interfaces.

An attention and a mask function are registered; forward hooks put an engine cache where the model
would use a fresh one of its own. Nothing is patched at import, and `Attachment.remove` leaves the
model as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvpress import twins
from kvpress.attend import prompt_attention
from kvpress.cache import EngineCache, Lease, uncompiled
from kvpress.cache_layer import tagged_layer
from kvpress.errors import AttachError, CacheError, UnsupportedModelError
from kvpress.kinds import BIDIRECTIONAL, STATE, Fingerprint, fingerprint, refuse
from kvpress.masks import (
    check_mask,
    inline_token_mask,
    new_token_mask,
    refuse_mask,
    refuse_packing,
    with_mask,
)
from kvpress.types import EMPTY

NAME = "kvpress"  # of the attention implementation
INLINE = "kvpress-inline"  # for models that compute attention by themselves; see inline.py
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CACHE_NAMES = ("cache", "past_key_values")  # of the argument: since transformers 5.24, and before
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
    """transformers' attention function: `[B, N, P, D]` queries in, `[B, P, N, D]` out.

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
    if layer is not None and layer.state.kind.window != sliding_window:
        raise UnsupportedModelError(
            f"Layer {layer.state.kind.index} attends with sliding_window={sliding_window}, but its"
            f" config says {layer.state.kind.window}. The layer kinds of this model cannot be read."
        )
    if layer is not None:
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


_attention_uncompiled = uncompiled(attention)


def _check_options(module: torch.nn.Module, dropout: float, options: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for options that change attention in a way unknown here."""
    asked = (x for x in _REFUSED & options.keys() if options[x] is not None)
    given = sorted(x for x in asked if options[x] is not False)
    if given or dropout:
        refuse_options(type(module).__name__, ", ".join(given) or f"dropout={dropout}")


def refuse_options(name: str, options: str) -> NoReturn:
    """Raises UnsupportedModelError: what the attention of `name` is asked for."""
    raise UnsupportedModelError(
        f"The attention of {name} asks for {options}, which this engine does not support. Drop the"
        " option (for dropout: model.eval()) or detach the engine."
    )


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_BP: Tensor | None,
    scale: float,
    softcap: float,
    window: int | None,
) -> Tensor:
    """Attention without a cache."""
    if valid_BP is None:
        return prompt_attention(query, key, value, None, scale, softcap, window)
    column_P = torch.arange(key.shape[2], device=key.device)
    position_BP = column_P.where(valid_BP, EMPTY)
    position_BHP = position_BP[:, None].expand(-1, key.shape[1], -1)
    out = prompt_attention(query, key, value, position_BHP, scale, softcap, window)
    return out.masked_fill(~valid_BP[:, None, :, None], 0.0)


def cache_name(model: torch.nn.Module) -> str:
    """By which name a module's forward pass takes its cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in taken), _CACHE_NAMES[-1])


class Attachment:
    """What `install` changed on a model, and how to undo it."""

    def __init__(
        self, model: PreTrainedModel, new_cache: Callable[[], EngineCache], lease: Lease
    ) -> None:
        self.fingerprint = check_model(model)
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, new_token_mask)
        AttentionMaskInterface.register(INLINE, inline_token_mask)
        self._model, self._new_cache, self._lease = model, new_cache, lease
        self._inline = self.fingerprint.kinds[0].inline
        self._before = model.config._attn_implementation
        self._passing: EngineCache | None = None  # of a pass without a cache
        self._replaced: WeakSet[Cache] = WeakSet()  # empty caches of callers that ours stood for
        self._set_implementation(INLINE if self._inline else NAME)
        modules = {id(m): m for m in (model, model.base_model)}.values()
        self._cache_names = {id(module): cache_name(module) for module in modules}
        self._hooks = []
        for module in modules:
            self._hooks.append(
                module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            )
            self._hooks.append(module.register_forward_hook(self._after_forward, with_kwargs=True))

    def remove(self) -> None:
        """Puts the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._set_implementation(self._before)

    def _set_implementation(self, name: str) -> None:
        """What the model asks for its masks, and for attention if it calls a function for it."""
        if self._inline:
            self._model.config._attn_implementation = name
        else:
            self._model.set_attn_implementation(name)
        if self._model.config._attn_implementation != name:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} does not let its attention be set to {name!r}"
                " through transformers' attention interface. Use a model that supports it."
            )

    @uncompiled
    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(kwargs)
        if args:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**bound.pop("kwargs", {}), **bound}
        if self._inline:
            self._check_inline(given)
        passed = [given.pop(name) for name in _CACHE_NAMES if name in given]
        cache = next((cache for cache in passed if cache is not None), None)
        use_cache = given.get("use_cache")
        config = self._model.config.get_text_config(decoder=True)
        if cache is None and not (config.use_cache if use_cache is None else use_cache):
            if not self._inline:
                return (), with_mask(given)
            refuse_packing(given)
            cache = self._passing = self._new_cache()  # without one nothing could attend
        given[self._cache_names[id(module)]] = cache = self._cache_for(cache)
        if module is self._model:
            cache.begin()
        else:  # perhaps a part of the same pass
            cache.check_whole()
        check_mask(cache, given)
        if module is self._model:
            cache.announce(given.get("logits_to_keep"))
            if not getattr(config, "output_router_logits", False):
                cache.spread = twins.merge(given, cache, self._cache_names[id(module)])
        return (), given

    def _check_inline(self, given: dict[str, Any]) -> None:
        """Raises what `attention` would, for models that do not call it."""
        asked = given.get("output_attentions")
        if self._model.config.output_attentions if asked is None else asked:
            refuse_options(type(self._model).__name__, "output_attentions")
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            refuse_mask(mask)

    def _cache_for(self, cache: Any) -> EngineCache:
        """The engine cache to use for what the caller passed."""
        if isinstance(cache, EngineCache):
            stranger = cache.lease.active and cache.lease is not self._lease
            if cache.fingerprint != self.fingerprint or stranger:
                raise CacheError(
                    f"This cache was made for {cache.fingerprint}{' by another engine' * stranger},"
                    f" but the model is {self.fingerprint}. Make a cache with engine.new_cache() of"
                    " the engine attached to this model."
                )
            return cache
        if cache is None:
            return self._new_cache()
        usable = isinstance(cache, DynamicCache) and not cache.offloading
        if not usable or cache.get_seq_length():
            length = f" of {cache.get_seq_length()} tokens" if isinstance(cache, Cache) else ""
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}{length}. While the engine is"
                " attached, pass engine.new_cache(), an empty DynamicCache, or nothing."
            )
        # An empty DynamicCache is what generate() makes when it is given none.
        if cache in self._replaced:
            raise CacheError(
                "This DynamicCache stayed empty: while the engine is attached, its own cache is"
                " used instead. Go on with the past_key_values of the last output, or pass"
                " engine.new_cache() from the start."
            )
        self._replaced.add(cache)
        ours = self._new_cache()
        ours.follows_generate = True
        if any(getattr(layer, "record_past", False) for layer in cache.layers):
            ours.activate_past_recording()
        return ours

    @uncompiled
    def _after_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        cache = kwargs.get(self._cache_names[id(module)])
        if not isinstance(cache, EngineCache):
            return None
        cache.check_attended()
        if module is self._model:
            kinds, cache.spread = cache.spread, None
            if kinds is not None:
                twins.spread(output, cache, kinds)
        return _without(cache, output) if cache is self._passing else None


def _without(cache: EngineCache, output: Any) -> Any:
    """The output of a forward pass, which nobody asked to return a cache."""
    if isinstance(output, tuple):
        return tuple(x for x in output if x is not cache)
    return type(output)(**{name: x for name, x in output.items() if x is not cache})


def check_model(model: Any) -> Fingerprint:
    """The layer kinds of a model that the engine can be attached to.

    Raises AttachError or UnsupportedModelError.
    """
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"attach() takes a transformers model, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if model.config._attn_implementation in (NAME, INLINE):
        raise AttachError(
            "An engine is already attached to this model, or to one that shares its config object. "
            "Detach it first: engine.detach()."
        )
    name = type(model).__name__
    if model._is_stateful:
        refuse(name, STATE)
    shape = fingerprint(model.config)
    if not shape.kinds[0].inline and not model._can_set_attn_implementation():
        refuse(
            name,
            "attention that bypasses transformers' attention interface",
            "models whose attention goes through ALL_ATTENTION_FUNCTIONS. Use such a model, or a"
            " transformers in which this one does",
        )
    if any(key.endswith(".sinks") for key, _ in model.named_parameters()):
        refuse(name, "learned attention sinks")
    for module in model.modules():
        if getattr(module, "is_causal", True) is False:
            refuse(name, BIDIRECTIONAL, detail=type(module).__name__)
    if model.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{name} computes in {model.dtype}. Allowed: {', '.join(map(str, _DTYPES))}. Load it"
            " with one of these.",
            f"computes in {model.dtype}",
        )
    return shape
