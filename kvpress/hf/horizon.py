"""How many tokens a call of `generate()` may decode, as transformers reads its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_UNSAID = 20  # transformers' own, where nobody says how many


def expected_new_tokens(
    args: Sequence[Any], kwargs: Mapping[str, Any], defaults: Any, prompt_length: int
) -> int:
    """The most tokens that `model.generate(*args, **kwargs)` decodes in one sequence.

    defaults: the model's generation_config. Keywords go before the generation_config of the call,
    by name or as the second argument, and that goes before the defaults; `max_new_tokens` goes
    before `max_length`, which counts the prompt. prompt_length: as `prompt_length()` finds it.
    """
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def said(name: str) -> int | None:
        if name in kwargs:
            value = kwargs[name]
        else:
            own = getattr(given, name, None)
            value = getattr(defaults, name, None) if own is None else own
        return None if value is None else int(value)

    new, length = said("max_new_tokens"), said("max_length")
    if new is None:
        new = _UNSAID if length is None else length - prompt_length
    return max(0, new)


def prompt_length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The tokens that `generate(*args, **kwargs)` is given, in every sequence, padding included."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    lengths = [int(tokens.shape[1]) for tokens in given if tokens is not None]
    return lengths[0] if lengths else 1  # a first token of transformers' own
