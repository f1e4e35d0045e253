"""Attaching to a transformers model through its official interfaces.

An attention and a mask function are registered; forward hooks put an engine cache where the model
would use a fresh one of its own. Nothing is patched at import, and `Attachment.remove` leaves the
model as it was.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvpress.errors import AttachError, CacheError, UnsupportedModelError
from kvpress.hf import copies, dedup, second_look
from kvpress.hf.attention import attention
from kvpress.hf.cache import EngineCache
from kvpress.hf.calls import Calls, Newest
from kvpress.hf.compat import uncompiled
from kvpress.hf.foresight import look
from kvpress.hf.generation import CACHE_NAMES, Way, cache_name, wrapped
from kvpress.hf.guard import Guard
from kvpress.hf.guessing import Guessing, guessed
from kvpress.hf.latent import UPDATED
from kvpress.hf.masks import (
    check_mask,
    check_places,
    counts_places,
    idle_rows,
    inline_token_mask,
    new_token_mask,
    refuse_mask,
    refuse_packing,
    with_mask,
)
from kvpress.hf.spec import CacheSpec
from kvpress.hf.support import INLINE, NAME, refuse_options
from kvpress.hf.together import Together
from kvpress.hf.unwrap import set_implementation, text_model
from kvpress.pipe.state.ids import said_by, text_of


class CacheMaker(Protocol):
    """What an attachment asks of its engine."""

    newest: Newest

    def make(self) -> EngineCache:
        """An empty cache that nobody asked for by name."""
        ...


class Attachment:
    """What was changed on a model, and how to undo it."""

    def __init__(
        self, model: PreTrainedModel, spec: CacheSpec, maker: CacheMaker, compresses: bool
    ) -> None:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, new_token_mask)
        AttentionMaskInterface.register(INLINE, inline_token_mask)
        self._spec, self._model, self._maker = spec, model, maker
        self._inline = spec.fingerprint.kinds[0].inline
        self._name = INLINE if self._inline else NAME
        self._text = text_model(model)
        self._before = (model.config._attn_implementation, self._text.config._attn_implementation)
        self._passing: EngineCache | None = None  # of a pass without a cache
        self._guessing: Guessing | None = None
        self.calls = Calls()
        self._guard = None if spec.plan is None else Guard(spec.plan)
        self._set_implementation(model, self._name, self._name)
        if model.config._attn_implementation != self._name:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let its attention be set to {self._name!r}"
                " through transformers' attention interface. Use a model that supports it."
            )
        inner = (self._text.base_model, model.base_model, model)
        self._modules = list({id(m): m for m in inner}.values())
        self._cache_names = {id(module): cache_name(module) for module in self._modules}
        counting = self._modules if counts_places(spec.recipe) else []
        self._counts_places = {id(module) for module in counting if _takes_positions(module)}
        self._hooks = [self._hook(module) for module in self._modules]
        self._generate = vars(model).get("generate")  # somebody else's
        if hasattr(model, "generate"):
            way = Way(
                self._cache_for, self.calls, maker.newest, compresses, self._guard, spec.ranks
            )
            vars(model)["generate"] = wrapped(model, way)
        self._guessing = self._begin_guessing()

    def _begin_guessing(self) -> Guessing | None:
        """Guesses queries where a policy asks for it. Raises UnsupportedModelError."""
        try:
            layers, name = guessed(self._spec), self._cache_names[id(self._modules[0])]
            return Guessing(self._model, layers, self._maker.make(), name) if layers else None
        except BaseException:
            self.remove()
            raise

    def _hook(self, module: torch.nn.Module) -> list[RemovableHandle]:
        handles = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        ids = [handle.id for handle in handles]
        copies.copied_plain(
            module, ids, ["generate"], lambda twin: self._set_implementation(twin, *self._before)
        )
        return handles

    def remove(self) -> None:
        """Puts the model back as it was."""
        if self._guessing is not None:
            self._guessing.remove()
        for module, handles in zip(self._modules, self._hooks, strict=True):
            for handle in handles:
                handle.remove()
            copies.forget(module)
        vars(self._model).pop("generate", None)
        if self._generate is not None:
            vars(self._model)["generate"] = self._generate
        self._set_implementation(self._model, *self._before)

    def _set_implementation(self, model: Any, name: str, text: str) -> None:
        if self._inline:
            model.config._attn_implementation = name
        else:
            set_implementation(model, name, text)

    @uncompiled
    def _before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        UPDATED.forget()
        given = dict(kwargs)
        if args:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**bound.pop("kwargs", {}), **bound}
        self._check(given)
        passed = [given.pop(name) for name in CACHE_NAMES if name in given]
        cache = next((cache for cache in passed if cache is not None), None)
        if isinstance(cache, Together):
            cache.begin(self._spec.lease, given if module is self._modules[0] else None)
            return (), {**given, self._cache_names[id(module)]: cache}
        use_cache = given.get("use_cache")
        config = self._model.config.get_text_config(decoder=True)
        if cache is None and not (config.use_cache if use_cache is None else use_cache):
            if not self._inline:
                return (), with_mask(given)
            refuse_packing(given)
            cache = self._passing = self._made()  # without one nothing could attend
        given[self._cache_names[id(module)]] = cache = self._cache_for(cache)
        if self._guard is not None:
            self._guard.check(cache, given)
        if module is self._model:
            begin(cache)
            call = self.calls.of(cache)
            cache.context.recording.announce(None if call is None else call.begin(given))
        else:  # perhaps a part of the same pass
            cache.check_whole()
        check_mask(cache, given)
        if id(module) in self._counts_places and not cache.context.looks:
            check_places(cache, given)
        if self._spec.recipe.looks and not cache.context.looks:
            second_look.check_room(self._model, cache, given)
        merges = not getattr(config, "output_router_logits", False) and not cache.context.looks
        if module is self._model and merges and len(cache.context.protect) < 2:
            cache.repeats = dedup.merge(given, cache, self._cache_names[id(module)], config)
        if module is self._model:
            cache.outer = text_of(given)
        if module is self._modules[0]:
            _begin_layers(cache, said_by(cache.outer, given))
        return (), given

    def _check(self, given: dict[str, Any]) -> None:
        """Raises for what would bypass the engine, however it is said: keyword or config."""
        config = self._model.config
        if config._attn_implementation != self._name:
            raise AttachError(
                f"The attention of {type(self._model).__name__} was set to"
                f" {config._attn_implementation!r} while an engine is attached. Detach the engine"
                " first: kvpress.detach(model)."
            )
        asked = given.get("output_attentions")
        if config.output_attentions if asked is None else asked:
            refuse_options(type(self._model).__name__, "output_attentions")
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            refuse_mask(mask)

    def _cache_for(self, cache: Any) -> EngineCache:
        """The engine cache to use for what the caller passed; see `become` for an empty one."""
        if isinstance(cache, EngineCache):
            stranger = cache.spec.lease.active and cache.spec.lease is not self._spec.lease
            if cache.fingerprint != self._spec.fingerprint or stranger:
                by = " by another engine" if stranger else ""
                raise CacheError(
                    f"This cache was made for {cache.fingerprint}{by}, but the model is"
                    f" {self._spec.fingerprint}. Make a cache with engine.new_cache() of the engine"
                    " attached to this model."
                )
            return cache
        if cache is not None and (
            type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length()
        ):
            length = f" of {cache.get_seq_length()} tokens" if isinstance(cache, Cache) else ""
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}{length}. While the engine is"
                " attached, pass engine.new_cache(), an empty DynamicCache, or nothing."
            )
        if cache is None:
            return self._made()
        recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        ours = self._made(cache)
        if recording:
            ours.activate_past_recording()
        return ours

    def _made(self, place: Cache | None = None) -> EngineCache:
        """An empty cache, in the place of a caller's own where there is one."""
        cache = self._maker.make()
        if place is not None:
            cache = become(cache, place)
        if not self.calls.any:  # passes inside a generate(), guidance for one, replace nothing
            self._maker.newest.passed(cache)
        return cache

    @uncompiled
    def _after_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        cache = kwargs.get(self._cache_names[id(module)])
        if isinstance(cache, Together) and module is self._modules[0]:
            cache.end(kwargs)
        if not isinstance(cache, EngineCache):
            return None
        if cache.latest is not None:
            cache.latest.check_attended()
        if module is self._modules[0]:
            UPDATED.forget()
            cache.beside.end()
        cache.ids.note(cache.columns_seen, said_by(cache.outer, kwargs))
        call = self.calls.of(cache) if cache.context.held else None
        if second_look.waits(cache, None if call is None else call.columns):
            inner = self._modules[0]
            second_look.look_again(inner, cache, self._cache_names[id(inner)])
        if module is self._model:
            cache.outer = None
            repeats, cache.repeats = cache.repeats, None
            if repeats is not None:
                dedup.repeat_outputs(output, cache, repeats)
        return _without(cache, output) if cache is self._passing else None


def _begin_layers(cache: EngineCache, said: dict[str, Any]) -> None:
    look(cache, said)
    cache.beside.begin(idle_rows(cache, said) if cache.beside else None)


def _takes_positions(module: Any) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def begin(cache: EngineCache) -> None:
    """Undoes what a forward pass that raised before its first layer left behind.

    Raises CacheError if it got further than that.
    """
    if cache.latest is not None:
        cache.latest.waiting = None
    repeats, cache.repeats = cache.repeats, None
    if repeats is not None:
        cache.select(repeats.tolist())
    cache.check_whole()


def become(cache: EngineCache, empty: Cache) -> EngineCache:
    """The cache as the caller's own object, which was empty; its copies then are copies of it.

    transformers fills the caches of a caller in place. So an empty one turns into an engine cache
    where it stands: whoever holds it holds what was read.
    """
    empty.__class__ = type(cache)
    vars(empty).clear()
    vars(empty).update(vars(cache))
    return cast(EngineCache, empty)


def _without(cache: EngineCache, output: Any) -> Any:
    """The output of a forward pass, which nobody asked to return a cache."""
    if isinstance(output, tuple):
        return tuple(x for x in output if x is not cache)
    return type(output)(**{name: x for name, x in output.items() if x is not cache})
