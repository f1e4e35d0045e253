"""Masks: which new tokens are real. Everything else follows from positions and what is stored."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from kvpress.errors import MaskError
from kvpress.hf import chunked
from kvpress.hf.cache import EngineCache
from kvpress.hf.compat import uncompiled
from kvpress.policy.recipe import Recipe

_NOT_PLAIN = (
    "The model asks for an attention pattern that is not plain causal or sliding-window (packed"
    " sequences, bidirectional blocks or a custom mask function). Only padding masks are supported."
)


@uncompiled
def new_token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: `[B, Q]` bool, which new tokens are real; None if all are.

    Causality and sliding windows follow from logical positions; stored slots are real by
    construction.
    """
    if chunked.asks_for_chunks(kwargs):
        sizes = (batch_size, q_length, kv_length)
        return chunked.mask(
            *sizes,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    if not allow_is_causal_skip:
        raise MaskError(_NOT_PLAIN)
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise MaskError(
            f"The attention mask has shape {tuple(attention_mask.shape)}, but"
            f" {kv_length - q_length} cached + {q_length} new tokens of {batch_size} sequences need"
            f" ({batch_size}, {kv_length}). Pass a mask that covers every token seen, evicted ones"
            " included."
        )
    valid_BQ = attention_mask[:, kv_length - q_length :].bool()
    return None if bool(valid_BQ.all()) else valid_BQ


@uncompiled
def inline_token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor:
    """The same for models that compute attention by themselves, and always want a mask."""
    plain = mask_function is causal_mask_function
    valid_BQ = new_token_mask(batch_size, q_length, kv_length, allow_is_causal_skip=plain, **kwargs)
    if valid_BQ is None:
        return torch.ones(batch_size, q_length, dtype=torch.bool, device=kwargs.get("device"))
    return valid_BQ


def with_mask(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass without a cache, with a mask where neither it nor positions are.

    Without one, transformers looks for packed sequences in the positions that it made itself, and
    always finds some while torch.compile traces it.
    """
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    known = given.get("attention_mask"), given.get("position_ids")
    if tokens is None or any(x is not None for x in known):
        return given
    mask_BQ = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return given | {"attention_mask": mask_BQ}


def refuse_packing(given: dict[str, Any]) -> None:
    """Raises MaskError where positions begin again: transformers then sees packed sequences.

    It looks for them where there is neither a mask nor a cache.
    """
    position = given.get("position_ids")
    if position is None or given.get("attention_mask") is not None:
        return
    if bool((position.diff(dim=-1) != 1).any()):
        raise MaskError(_NOT_PLAIN)


def refuse_mask(mask: Tensor) -> NoReturn:
    """Raises MaskError for a mask that is not one of padding."""
    raise MaskError(
        f"The attention mask has shape {tuple(mask.shape)} and dtype {mask.dtype}. Only 2-D padding"
        " masks [batch, tokens] are supported: custom 4-D masks cannot be honoured by a ragged"
        " cache."
    )


def check_mask(cache: EngineCache, given: dict[str, Any]) -> None:
    """Raises MaskError if a mask denies tokens that are stored, revives padding, or is missing.

    A decode step compares only how many tokens are real, and on a GPU nothing: reading the mask
    would make every step wait.
    """
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    seen, known_B = cache.columns_seen, cache.states[0].sequences.seen_B
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or not seen or len(known_B) != len(tokens):
        return
    if mask is None and cache.ids.ended:
        _check_positions(given.get("position_ids"), tokens, known_B, seen)
    if not isinstance(mask, Tensor) or mask.shape != (len(known_B), seen + tokens.shape[1]):
        return
    if tokens.shape[1] == 1 and mask.device.type != "cpu":
        return
    marked_BT = mask[:, :seen].bool()
    if not torch.equal(marked_BT.sum(1).cpu(), known_B):
        raise MaskError(
            f"The attention mask marks {marked_BT.sum(1).tolist()} of the cached tokens as real,"
            f" but the cache has seen {known_B.tolist()}. Pass the same mask for them as before."
            " Mark padding with 0, also what generate() fed a sequence after its end."
        )
    if tokens.shape[1] > 1 and cache.ids.columns == seen:
        other_BT = marked_BT != cache.ids.real().to(marked_BT.device)
        if bool(other_BT.any()):
            sequence, column = other_BT.nonzero()[0].tolist()
            raise MaskError(
                f"The attention mask marks column {column} of sequence {sequence} as"
                f" {'real' if marked_BT[sequence, column] else 'padding'}, but it was not when the"
                " cache saw it. Pass the same mask for the cached tokens as before."
            )


def idle_rows(cache: EngineCache, given: dict[str, Any]) -> Tensor | None:
    """Which sequences have no token in a pass of a model with states: bool `[B]`; None: none.

    Padding behind tokens of a sequence reaches its states as transformers lets it, which may not be
    as if it were alone: the report then says so.
    """
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None:
        return None
    real_BQ = mask[:, -tokens.shape[1] :].bool()
    if bool(real_BQ.all()):
        return None
    idle_B, part_B = ~real_BQ.any(1), ~real_BQ.all(1)
    behind = cache.columns_seen > 0 or not bool(real_BQ[:, -1].all())
    moves = bool((part_B & ~idle_B).any()) or (cache.beside.chunked and bool(idle_B.any()))
    if behind and moves:
        cache.context.ledger.note(
            "Padding stood behind tokens of its sequence, where layers that no policy compresses go"
            " on: what they hold is what transformers makes of it. Pad a first prompt on the left,"
            " and give later turns alone or of equal lengths."
        )
    return idle_B


def counts_places(recipe: Recipe) -> bool:
    """Whether keys must be turned by the number of their token, not by a column with padding.

    Probes stand behind the last token; what undoes the rotation undoes that of the number.
    """
    turns = any("rotation" in recipe.stage(name).needs for name in ("prune", "score"))
    return recipe.looks or turns


def check_places(cache: EngineCache, given: dict[str, Any]) -> None:
    """Raises MaskError where tokens of a prompt do not stand at their number in their sequence.

    For policies to which positions matter, not only their differences. A model that is given no
    `position_ids` counts columns, and padding with them.
    """
    mask, tokens, position = (given.get(x) for x in ("attention_mask", "input_ids", "position_ids"))
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or tokens.shape[1] == 1 or (position is not None and position.dim() != 2):
        return
    seen, new, known_B = cache.columns_seen, tokens.shape[1], cache.states[0].sequences.seen_B
    if seen and len(known_B) != len(tokens):
        return
    real_BQ = torch.ones(len(tokens), new, dtype=torch.bool, device=tokens.device)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= new:
        real_BQ = mask[:, -new:].bool()
    before_B1 = known_B[:, None].to(real_BQ.device) if seen else 0
    right_BQ = real_BQ.cumsum(1) - 1 + before_B1
    if position is None:
        position = torch.arange(seen, seen + new, device=real_BQ.device)
    if bool(((position.to(real_BQ.device) == right_BQ) | ~real_BQ).all()):
        return
    raise MaskError(
        f"{cache.spec.recipe} must know the positions of tokens, but those of this prompt count"
        " padding, or begin elsewhere. Pass position_ids = (attention_mask.cumsum(1) - 1).clamp(0),"
        f" the last {new} columns, as generate() does."
    )


def _check_positions(position: Any, tokens: Tensor, known_B: Tensor, seen: int) -> None:
    """Raises MaskError if tokens after a sequence's early end, without a mask, stand elsewhere."""
    if isinstance(position, Tensor) and tokens.shape[1] == 1 and position.device.type != "cpu":
        return  # a step must not wait
    offset_Q = torch.arange(tokens.shape[1], device=known_B.device)
    right_BQ = known_B[:, None] + offset_Q
    if isinstance(position, Tensor) and bool((position.to(known_B.device) == right_BQ).all()):
        return
    raise MaskError(
        f"Sequences of this cache met their end early: {known_B.tolist()} of {seen} columns are"
        " real, and without a mask that says so new tokens get wrong positions. Pass an"
        f" attention_mask of {seen} + {tokens.shape[1]} columns. Mark padding with 0, also what"
        " generate() fed a sequence after its end."
    )
