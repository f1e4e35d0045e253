"""Families of models that compute their attention by themselves: what their configs say of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Inline(NamedTuple):
    """How such a model attends.

    heads: KV heads. slopes: of the ALiBi bias of every query head, added to the scaled scores per
    position; None where positions are in the keys.
    """

    heads: int
    slopes: tuple[float, ...] | None = None


def inline(config: Any) -> Inline | None:
    """How a model of this config attends by itself; None if it calls an attention function."""
    family = _FAMILIES.get(getattr(config, "model_type", ""))
    return None if family is None else family(config)


def _bloom(config: Any) -> Inline:
    return Inline(config.num_attention_heads, _slopes(config.num_attention_heads))


def _falcon(config: Any) -> Inline:
    """Grouped queries and no ALiBi in the new architecture; one KV head with `multi_query`."""
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    else:
        kv_heads = 1 if config.multi_query else heads
    if not config.alibi:
        return Inline(kv_heads)
    width = config.hidden_size // heads
    return Inline(kv_heads, tuple(slope / math.sqrt(width) for slope in _slopes(heads)))


def _mpt(config: Any) -> Inline:
    """Its own slopes: every second one of twice the number, where heads are no power of two."""
    heads, steepest = config.num_attention_heads, config.attn_config.alibi_bias_max
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-steepest * i / power) for i in range(1, power + 1)]
    return Inline(heads, tuple(slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]))


def _slopes(heads: int) -> tuple[float, ...]:
    """Slopes of the ALiBi paper (Press et al., ICLR 2022, arXiv 2108.12409), section 3."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return tuple(slopes + between[: heads - power])


_FAMILIES: dict[str, Callable[[Any], Inline]] = {"bloom": _bloom, "falcon": _falcon, "mpt": _mpt}
