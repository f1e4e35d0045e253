"""Attaching to a transformers model through its official interfaces.

An attention and a mask function are registered; forward hooks put an engine cache where the model
would use a fresh one of its own. Nothing is patched at import, and `Attachment.remove` leaves the
model as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvpress import twins
from kvpress.attend import prompt_attention
from kvpress.cache import EngineCache, Lease, uncompiled
from kvpress.cache_layer import tagged_layer
from kvpress.errors import AttachError, CacheError, MaskError, UnsupportedModelError
from kvpress.kinds import BIDIRECTIONAL, STATE, Fingerprint, fingerprint, refuse
from kvpress.types import EMPTY

NAME = "kvpress"  # of the attention implementation
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
        raise MaskError(
            f"The attention mask has shape {tuple(attention_mask.shape)} and dtype"
            f" {attention_mask.dtype}. Only 2-D padding masks [batch, tokens] are supported: custom"
            " 4-D masks cannot be honoured by a ragged cache."
        )
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
        raise UnsupportedModelError(
            f"The attention of {type(module).__name__} asks for"
            f" {', '.join(given) or f'dropout={dropout}'}, which this engine does not support. Drop"
            " the option (for dropout: model.eval()) or detach the engine."
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


@uncompiled
def new_token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: `[B, P]` bool, which new tokens are real; None if all are.

    Causality and sliding windows follow from logical positions; stored slots are real by
    construction.
    """
    if not allow_is_causal_skip:
        raise MaskError(
            "The model asks for an attention pattern that is not plain causal or sliding-window"
            " (packed sequences, bidirectional blocks or a custom mask function). Only padding"
            " masks are supported."
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise MaskError(
            f"The attention mask has shape {tuple(attention_mask.shape)}, but"
            f" {kv_length - q_length} cached + {q_length} new tokens of {batch_size} sequences need"
            f" ({batch_size}, {kv_length}). Pass a mask that covers every token seen, evicted ones"
            " included."
        )
    valid_BP = attention_mask[:, kv_length - q_length :].bool()
    return None if bool(valid_BP.all()) else valid_BP


def _with_mask(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass without a cache, with a mask where neither it nor positions are.

    Without one, transformers looks for packed sequences in the positions that it made itself, and
    always finds some while torch.compile traces it.
    """
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    known = given.get("attention_mask"), given.get("position_ids")
    if tokens is None or any(x is not None for x in known):
        return given
    mask_BP = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return given | {"attention_mask": mask_BP}


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
        self._model, self._new_cache, self._lease = model, new_cache, lease
        self._before = model.config._attn_implementation
        self._replaced: WeakSet[Cache] = WeakSet()  # empty caches of callers that ours stood for
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let its attention be replaced through"
                " transformers' attention interface. Use a model that supports it."
            )
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
        self._model.set_attn_implementation(self._before)

    @uncompiled
    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(kwargs)
        if args:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**bound.pop("kwargs", {}), **bound}
        passed = [given.pop(name) for name in _CACHE_NAMES if name in given]
        cache = next((cache for cache in passed if cache is not None), None)
        use_cache = given.get("use_cache")
        config = self._model.config.get_text_config(decoder=True)
        if cache is None and not (config.use_cache if use_cache is None else use_cache):
            return (), _with_mask(given)
        given[self._cache_names[id(module)]] = cache = self._cache_for(cache)
        if module is self._model:
            cache.begin()
        else:  # perhaps a part of the same pass
            cache.check_whole()
        self._check_mask(cache, given)
        if module is self._model:
            cache.announce(given.get("logits_to_keep"))
            if not getattr(config, "output_router_logits", False):
                cache.spread = twins.merge(given, cache, self._cache_names[id(module)])
        return (), given

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

    def _check_mask(self, cache: EngineCache, given: dict[str, Any]) -> None:
        """Raises MaskError if a mask denies tokens that are stored, or revives padding.

        On a GPU only prompt chunks are checked: reading the mask would make every step wait.
        """
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        seen = cache.columns_seen
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None or not seen:
            return
        if tokens.shape[1] == 1 and mask.device.type != "cpu":
            return
        seen_B = mask[:, :seen].bool().sum(1).cpu()
        known_B = cache.states[0].seen_B
        if mask.shape == (len(known_B), seen + tokens.shape[1]) and not torch.equal(
            seen_B, known_B
        ):
            raise MaskError(
                f"The attention mask marks {seen_B.tolist()} of the cached tokens as real, but the"
                f" cache has seen {known_B.tolist()}. Pass the same mask for them as before."
            )

    @uncompiled
    def _after_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cache = kwargs.get(self._cache_names[id(module)])
        if isinstance(cache, EngineCache):
            cache.check_attended()
            if module is self._model:
                kinds, cache.spread = cache.spread, None
                if kinds is not None:
                    twins.spread(output, cache, kinds)


def check_model(model: Any) -> Fingerprint:
    """The layer kinds of a model that the engine can be attached to.

    Raises AttachError or UnsupportedModelError.
    """
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"attach() takes a transformers model, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if model.config._attn_implementation == NAME:
        raise AttachError(
            "An engine is already attached to this model, or to one that shares its config object. "
            "Detach it first: engine.detach()."
        )
    name = type(model).__name__
    if model._is_stateful:
        refuse(name, STATE)
    shape = fingerprint(model.config)
    if not model._can_set_attn_implementation():
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
