"""Calling the operators: one function each, with the errors of the engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpress.errors import KVPressError, OperatorError
from kvpress.ops.registry import warn


@functools.cache
def _operator(name: str) -> Any:
    warn()
    return getattr(torch.ops.kvpress, name).default


def _call(name: str, *args: Any) -> Any:
    """Runs an operator. Raises OperatorError for operands that it refuses, on every backend."""
    try:
        return _operator(name)(*args)
    except RuntimeError as error:
        _refused(name, error)


def _refused(name: str, error: RuntimeError) -> NoReturn:
    """Raises OperatorError for what an operator said of its operands; other errors as they are."""
    message, own = str(error), f"kvpress::{name}"
    if isinstance(error, KVPressError) or own not in message:
        raise error
    raise OperatorError(message[message.index(own) :].splitlines()[0]) from None


def decode_rows(
    *args: Any, old: Sequence[Tensor] = (), layouts: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new queries over ragged paged rows; see csrc/decode_rows."""
    out, lse, weights = _call("decode_rows", *args, old, layouts)
    return out, lse, weights


def decode_step(*args: Any, old: Sequence[Tensor] = (), layouts: Sequence[int] = ()) -> Tensor:
    """Append, attend, observe and evict in one call; see csrc/decode_step."""
    try:  # as `_call`, without another copy of the operands: this is the decode loop
        out: Tensor = _operator("decode_step")(*args, old, layouts)
    except RuntimeError as error:
        _refused("decode_step", error)
    return out


def absorb_step(*args: Any) -> None:
    """Evict one slot of rows above their quotas and merge it; see csrc/absorb_step."""
    _call("absorb_step", *args)


def attend_blocks(*args: Any) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of a bit map, and its LSE; see csrc/attend_blocks."""
    out, lse = _call("attend_blocks", *args)
    return out, lse


def attend_sums(*args: Any) -> tuple[Tensor, Tensor]:
    """Attention of a prompt and its column sums; see csrc/attend_sums."""
    out, sums = _call("attend_sums", *args)
    return out, sums


def attention_sums(*args: Any) -> Tensor:
    """Column sums of a prompt's attention; see csrc/attention_sums."""
    sums: Tensor = _call("attention_sums", *args)
    return sums


def match_keys(
    evicted_BHED: Tensor, kept_BHCD: Tensor, allowed_BHC: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine and index of the nearest kept key of every evicted key; see csrc/match_keys."""
    similarity, target = _call("match_keys", evicted_BHED, kept_BHCD, allowed_BHC)
    return similarity, target


def pack(*args: Any) -> Tensor:
    """Whole pages of old slots: kept channels, quantised; see csrc/pack."""
    pages: Tensor = _call("pack", *args)
    return pages


def unpack(*args: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages of old slots; see csrc/unpack."""
    key, value = _call("unpack", *args)
    return key, value


def channel_scores(query_BNWD: Tensor, key_BHSD: Tensor, held_BHS: Tensor) -> Tensor:
    """How much each key channel contributes to the logits of queries; see csrc/channel_scores."""
    scores: Tensor = _call("channel_scores", query_BNWD, key_BHSD, held_BHS)
    return scores


def estimate_blocks(*args: Any) -> Tensor:
    """The bit map of blocks that matter, from 4-bit codes; see csrc/estimate_blocks."""
    computed: Tensor = _call("estimate_blocks", *args)
    return computed


def gather_slots(pool_PX: Tensor, address_N: Tensor, slot_last: bool = False) -> Tensor:
    """Dense copies of slots; see csrc/gather_slots."""
    slots: Tensor = _call("gather_slots", pool_PX, address_N, slot_last)
    return slots


def scatter_slots(
    pool_PX: Tensor, address_N: Tensor, slots_NX: Tensor, slot_last: bool = False
) -> None:
    """Writes slots into a pool; see csrc/scatter_slots."""
    _call("scatter_slots", pool_PX, address_N, slots_NX, slot_last)
