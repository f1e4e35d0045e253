"""Calling the operators: one function each, with the errors of the engine.

They take the fields of the `Operands` of their folder, by place or by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpress.errors import KVPressError, OperatorError
from kvpress.ops.operands import flattening
from kvpress.ops.registry import operands_of, warn


@functools.cache
def _operator(name: str) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    warn()
    return getattr(torch.ops.kvpress, name).default, flattening(operands_of(name))


def _call(name: str, operands: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Runs an operator. Raises OperatorError for operands that it refuses, on every backend."""
    run, flat = _operator(name)
    try:
        return run(*flat(*operands, **named))
    except RuntimeError as error:
        _refused(error)


def _refused(error: RuntimeError) -> NoReturn:
    """Raises OperatorError for what an operator said of its operands; other errors as they are.

    One that others are part of passes on what they say.
    """
    message, own = str(error), "kvpress::"
    if isinstance(error, KVPressError) or own not in message:
        raise error
    raise OperatorError(message[message.index(own) :].splitlines()[0]) from None


def decode_rows(*operands: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new queries over ragged paged rows; see csrc/decode_rows."""
    out, lse, weights = _call("decode_rows", operands, named)
    return out, lse, weights


def decode_step(*operands: Any, **named: Any) -> Tensor:
    """Append, attend, observe and evict in one call; see csrc/decode_step."""
    run, flat = _operator("decode_step")
    try:  # as `_call`, without another copy of the operands: this is the decode loop
        out: Tensor = run(*flat(*operands, **named))
    except RuntimeError as error:
        _refused(error)
    return out


def decode_steps(*operands: Any, **named: Any) -> Tensor:
    """Decode steps of one layer in several caches at once; see csrc/decode_steps."""
    out: Tensor = _call("decode_steps", operands, named)
    return out


def decode_together(steps: Sequence[tuple[Any, ...]]) -> Tensor:
    """`decode_steps`, from the operands of `decode_step` for each: outputs `[T, N, 1, E]`.

    Raises OperatorError, before anything is written, also for steps with old slots, and unless they
    have rank, logits, kind and place of the noise in common, and all a mass or none.
    """
    flat = _operator("decode_step")[1]
    fields = zip(*(flat(*step) for step in steps), strict=True)
    *tensors, rank, evict, noise, tau, seed, layer, first, scaling, softcap, old, _ = fields
    masses = tensors[8]
    lacks = [mass is None for mass in masses]
    common = [set(values) for values in (rank, noise, layer, first, scaling, softcap, lacks)]
    if any(old) or any(len(values) > 1 for values in common):
        raise OperatorError(f"kvpress::decode_steps: steps that are not alike: {common}")
    return decode_steps(
        tensors[:3],
        tensors[3:7],
        (tensors[7], () if lacks[0] else masses),
        (*tensors[9:], rank[0]),
        [int(x) for x in evict],
        (noise[0], tau, seed, layer[0], first[0]),
        (scaling[0], softcap[0]),
    )


def decode_chosen(*operands: Any, **named: Any) -> tuple[Tensor, ...]:
    """A decode step that reads in part: see csrc/decode_chosen."""
    found: tuple[Tensor, ...] = _call("decode_chosen", operands, named)
    return found


def absorb_step(*operands: Any, **named: Any) -> None:
    """Evict one slot of rows above their quotas and merge it; see csrc/absorb_step."""
    _call("absorb_step", operands, named)


def attend_blocks(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of a bit map, and its LSE; see csrc/attend_blocks."""
    out, lse = _call("attend_blocks", operands, named)
    return out, lse


def attend_parts(*operands: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `decode_rows` finds in every chunk of 512 slots; see csrc/attend_parts."""
    out, lse, weights = _call("attend_parts", operands, named)
    return out, lse, weights


def attend_sums(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Attention of a prompt and its column sums; see csrc/attend_sums."""
    out, sums = _call("attend_sums", operands, named)
    return out, sums


def attention_sums(*operands: Any, **named: Any) -> Tensor:
    """Column sums of a prompt's attention; see csrc/attention_sums."""
    sums: Tensor = _call("attention_sums", operands, named)
    return sums


def join_parts(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Attention over several parts of the slots, from that over each; see csrc/join_parts."""
    out, lse = _call("join_parts", operands, named)
    return out, lse


def match_keys(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Cosine and index of the nearest kept key of every evicted key; see csrc/match_keys."""
    similarity, target = _call("match_keys", operands, named)
    return similarity, target


def pack(*operands: Any, **named: Any) -> Tensor:
    """Whole pages of old slots: kept channels, quantised; see csrc/pack."""
    pages: Tensor = _call("pack", operands, named)
    return pages


def unpack(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages of old slots; see csrc/unpack."""
    key, value = _call("unpack", operands, named)
    return key, value


def channel_scores(*operands: Any, **named: Any) -> Tensor:
    """How much each key channel contributes to the logits of queries; see csrc/channel_scores."""
    scores: Tensor = _call("channel_scores", operands, named)
    return scores


def estimate_blocks(*operands: Any, **named: Any) -> Tensor:
    """The bit map of blocks that matter, from 4-bit codes; see csrc/estimate_blocks."""
    computed: Tensor = _call("estimate_blocks", operands, named)
    return computed


def read_records(*operands: Any, **named: Any) -> Tensor:
    """Ranges of a file into an arena, verified: a status each; see csrc/read_records."""
    status: Tensor = _call("read_records", operands, named)
    return status


def copy_ranges(*operands: Any, **named: Any) -> None:
    """Ranges of bytes to rows, without the interpreter's lock; see csrc/copy_ranges."""
    _call("copy_ranges", operands, named)


def gather_slots(*operands: Any, **named: Any) -> Tensor:
    """Dense copies of slots; see csrc/gather_slots."""
    slots: Tensor = _call("gather_slots", operands, named)
    return slots


def scatter_slots(*operands: Any, **named: Any) -> None:
    """Writes slots into a pool; see csrc/scatter_slots."""
    _call("scatter_slots", operands, named)


def page_bounds(*operands: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The box of the keys of each page, its lengths, and their cells; see csrc/page_bounds."""
    box, length, cell = _call("page_bounds", operands, named)
    return box, length, cell


def score_pages(*operands: Any, **named: Any) -> Tensor:
    """Upper bounds of the products of queries with the keys of pages; see csrc/score_pages."""
    bound: Tensor = _call("score_pages", operands, named)
    return bound


def score_cells(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Tighter bounds of some pages, by the cells of their keys; see csrc/score_cells."""
    rank, bound = _call("score_cells", operands, named)
    return rank, bound


def choose_pages(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The places of the pages of each row that are read; see csrc/choose_pages."""
    place, chosen = _call("choose_pages", operands, named)
    return place, chosen


def search_pages(*operands: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `choose_pages` gives on `score_pages`, by a tree of boxes; see csrc/search_pages."""
    place, chosen, bound, boxes = _call("search_pages", operands, named)
    return place, chosen, bound, boxes


def missed_mass(*operands: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """How much attention pages that are not read hold at most; see csrc/missed_mass."""
    mass, length = _call("missed_mass", operands, named)
    return mass, length
