"""`generate()` of an attached model: which cache it fills, and which options cannot be honoured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from kvpress.errors import CacheError, InputError, UnsupportedModelError
from kvpress.hf.agreeing import agreed
from kvpress.hf.cache import EngineCache
from kvpress.hf.calls import Call, Calls, EndedRows, Heard, Newest
from kvpress.hf.guard import Guard
from kvpress.hf.horizon import expected_new_tokens, prompt_length
from kvpress.parallel import ALONE, Ranks

CACHE_NAMES = ("cache", "past_key_values")  # of the argument: since transformers 5.24, and before


def cache_name(model: torch.nn.Module) -> str:
    """By which name a module's forward pass takes its cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[-1])


class Way(NamedTuple):
    """What the engine lends to the calls of its model."""

    cache_for: Callable[[Any], EngineCache]  # what a caller passed as a cache -> the one to use
    calls: Calls
    newest: Newest
    compresses: bool  # whether anything is lost when a call uses no cache
    guard: Guard | None = None  # what holds calls to a plan
    ranks: Ranks = ALONE  # the processes that hold the model together


def wrapped(model: Any, way: Way) -> Callable[..., Any]:
    """The model's `generate` with a compressed cache, for any caller."""
    generate = model.generate

    @functools.wraps(generate)
    def with_engine(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        asked = Asked(given, model.generation_config)
        if not _uses_cache(asked, way.compresses):
            return generate(**given)
        if not way.ranks.alone:
            seconds = asked("max_time")
            given = agreed(way.ranks, given, asked.ids, seconds)
            asked = Asked(given, model.generation_config)
        call, given = _prepared(model, way, asked)
        with way.calls.entered(call):
            out = generate(**given)
        if call.drafts:
            call.cache.stop_past_recording()  # tokens that are still drafted were accepted
        return out

    return with_engine


class Asked:
    """The options of a call: keywords, then its generation config, then the model's own."""

    def __init__(self, given: dict[str, Any], config: Any) -> None:
        self.given, self._configs = given, (given.get("generation_config"), config)

    def __call__(self, name: str, default: Any = None) -> Any:
        """The value of an option that holds for the call."""
        if name in self.given:
            return self.given[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), default)

    @property
    def ids(self) -> Any:
        """What was given as the text."""
        return next(
            (x for x in map(self.given.get, ("inputs", "input_ids")) if x is not None), None
        )

    def by_caller(self, name: str) -> Any:
        """What the caller said: by keyword, or in a generation config of this call."""
        if name in self.given:
            return self.given[name]
        return getattr(self._configs[0], name, None)


def _uses_cache(asked: Asked, compresses: bool) -> bool:
    """Raises what is refused before anything changes; False: nothing is to be compressed."""
    text = asked.ids
    if isinstance(text, str) or (isinstance(text, list) and text and isinstance(text[0], str)):
        raise InputError(
            f"generate() was given text ({str(text)[:40]!r}). It takes token ids: tokenizer(text,"
            ' return_tensors="pt"), then generate(**inputs).'
        )
    if asked("assistant_early_exit") is not None:
        raise UnsupportedModelError(
            "assistant_early_exit lets the first layers of this model draft with a cache of their"
            " own, which this engine does not support. Use assistant_model or"
            " prompt_lookup_num_tokens, or detach the engine."
        )
    implementation = asked.given.get("cache_implementation")
    if implementation is not None:
        raise CacheError(
            f"cache_implementation={implementation!r} asks for a cache of transformers' own, but an"
            " engine is attached, which uses its own. Leave the option out, or detach the engine."
        )
    if asked.by_caller("use_cache") is not False:
        return True
    if compresses:
        raise CacheError(
            "generate(use_cache=False) keeps no cache, so that nothing would be compressed. Leave"
            " the option out, or detach the engine."
        )
    return False


def _prepared(model: Any, way: Way, asked: Asked) -> tuple[Call, dict[str, Any]]:
    """The call, and the arguments with which transformers fills its cache."""
    given = dict(asked.given)
    passed = [given.pop(name) for name in CACHE_NAMES if name in given]
    cache = way.cache_for(next((cache for cache in passed if cache is not None), None))
    assists = bool(asked("is_assistant"))
    if assists:
        cache.activate_past_recording()  # its tokens are drafts of another model's call
    else:
        cache.stop_past_recording()  # speculative decoding starts it again
    check_continuation(cache, asked)
    if not assists:
        length = prompt_length((), given)
        new = expected_new_tokens((), given, model.generation_config, length)
        if way.guard is not None:
            way.guard.call(given, _columns(given), new)
        cache.expect(new)
    for name, ours in (("use_cache", True), ("cache_implementation", None)):
        theirs = asked(name)
        if theirs is not None and theirs != ours:
            cache.context.ledger.note(
                f"The generation config asks for {name}={theirs!r}: the engine's cache was used"
                " instead."
            )
            given[name] = ours
    given[cache_name(model)] = cache
    rows = _ended_rows(asked)
    if rows is not None:
        theirs = given.get("stopping_criteria") or []
        own = [c if _is_stock(c) else Heard(c, rows) for c in theirs]
        given["stopping_criteria"] = StoppingCriteriaList([rows, *own])
    if not way.calls.any:
        way.newest.generated(cache)
    return Call(cache, rows, not assists, _columns(given)), given


def _columns(given: dict[str, Any]) -> int:
    """Columns of the whole text of a call, of which perhaps only the new tokens are given."""
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.shape[1])
    return prompt_length((), given)


def check_continuation(cache: EngineCache, asked: Asked) -> None:
    """Raises CacheError if the ids of a call do not go on from what its cache has seen."""
    ids, mask, seen = asked.ids, asked.given.get("attention_mask"), cache.columns_seen
    if not seen or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    if isinstance(mask, Tensor) and mask.shape[1] != ids.shape[1]:
        return  # only new tokens, with a mask of everything: nothing to compare
    if ids.shape[1] <= seen:
        raise CacheError(
            f"generate() was given {ids.shape[1]} tokens, but the cache has seen {seen} already."
            " Give the whole text, what the cache has seen and at least one new token after it:"
            " torch.cat([context_ids, question_ids], dim=1)."
        )
    if cache.batch_size % len(ids):
        return  # refused by the layers
    place = cache.ids.differs(ids.repeat_interleave(cache.batch_size // len(ids), 0))
    if place is not None:
        sequence, column = place
        raise CacheError(
            f"The ids do not go on from this cache: it has seen token"
            f" {int(cache.ids.all()[sequence, column])} at column {column} of sequence {sequence},"
            f" but {int(ids[sequence * len(ids) // cache.batch_size, column])} is given there. Pass"
            " the ids of the whole text as the earlier call returned them, or a new cache."
        )


def _ended_rows(asked: Asked) -> EndedRows | None:
    """What notes the rows that end early; None where none can, or where they are not padded."""
    theirs, ids = asked("stopping_criteria") or [], asked.ids
    ends = asked("eos_token_id")
    if ends is None and not any(hasattr(criterion, "eos_token_id") for criterion in theirs):
        return None  # then generate() pads nothing
    alone = isinstance(ids, Tensor) and len(ids) * (asked("num_return_sequences") or 1) == 1
    if alone or (asked("num_beams") or 1) > 1:
        return None
    own = [criterion for criterion in theirs if _is_stock(criterion)]
    strings, tokenizer = asked("stop_strings"), asked("tokenizer")
    if strings is not None and tokenizer is not None:
        own.append(StopStringCriteria(tokenizer, strings))
    every = torch.as_tensor([] if ends is None else ends, dtype=torch.int64, device="cpu")
    return EndedRows(every.flatten().tolist(), own)


def _is_stock(criterion: Any) -> bool:
    """Whether a criterion is transformers' own, and may be asked twice."""
    return type(criterion).__module__.startswith("transformers.")
