"""What old slots keep of their keys and values: channels and bits, and what decides that.

Formats are given to a sequence once, when its first slots become old: from then on the same
channels are kept of every slot that leaves the recent tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.formulas.page_layout import PageLayout
from kvpress.formulas.rotation import Rotation
from kvpress.types import EMPTY, Turned

_RAW_SLOTS, _SLOTS = 32, 64  # of a page of old slots: as they came, and quantised
_UNIT = 128  # bits of a key channel in a page: kernels read as many at once
SHORT = 512  # slots below which a row with a budget is short, and has smaller pages
WIDE = 8  # bits of rows that the guard keeps from fewer


class Packing(NamedTuple):
    """Bits of old slots. 16: the dtype of the store, not quantised.

    Keys in groups of tokens, one step per channel; values in groups of channels, one step per token
    (KIVI, Liu et al., ICML 2024, arXiv 2402.02750). bound: rows whose attention output moves by
    more than this share, on average over the last `window` queries, get 8 bits; None: never.
    rotate: whether the layer's values, or its keys behind their positions and its queries too, are
    turned by a Hadamard matrix before anything is stored; outputs are turned back. boost: the share
    of key channels with codes of twice the bits, those that the last `window` queries need most.
    """

    key_bits: int = 16
    value_bits: int = 16
    key_group: int = 64
    value_group: int = 64
    bound: float | None = None
    window: int = 0
    rotate: Turned = "none"
    boost: float = 0.0

    def boosted(self, width: int) -> int:
        """How many of so many key channels have codes of twice the bits."""
        return round(self.boost * width)

    def check_beside(self, prunes: bool, retrieves: bool, recipe: str) -> None:
        """Raises PolicyError where channels are left out, or bounded, that became others."""
        if self.boost and retrieves:
            raise PolicyError(
                f"{recipe} bounds the keys of pages, and a channel with two codes has no bounds."
                " Leave boost out."
            )
        if self.boost and prunes:
            raise PolicyError(
                f"{recipe} leaves channels out, and boost={self.boost:g} gives some of them twice"
                " the bits. Leave one of the two out."
            )
        if self.rotate != "none" and prunes:
            raise PolicyError(
                f"{recipe} leaves channels out, but rotate={self.rotate} makes each of them a mix"
                " of all. Leave one of the two out."
            )


class Channels(NamedTuple):
    """The kept channels of keys and values: whole numbers, ascending; None: all of them."""

    key_BHC: Tensor | None = None
    value_BHU: Tensor | None = None


@dataclass(frozen=True)
class Window:
    """The last queries of some sequences, and all slots that they hold, in order of positions.

    W may be smaller than what the policy asked for: texts may be that short.
    """

    layer: int
    query_BNQD: Tensor
    key_BHSD: Tensor
    value_BHSE: Tensor
    position_BHS: Tensor  # int64; EMPTY where there is no token
    seen_B: Tensor  # int64: real tokens so far; the last query is that of the last one
    scaling: float
    softcap: float
    rotation: Rotation | None = None  # how keys turn, where the policy asked for that

    @property
    def held_BHS(self) -> Tensor:
        """Whether a slot holds a token."""
        return self.position_BHS != EMPTY

    @cached_property
    def attention_BHMS(self) -> Tensor:
        """Softmax attention of the queries: fp32, M = G·W members of a KV head's query group."""
        return self._attention(self.key_BHSD)

    def errors(self, key_BHSD: Tensor, value_BHSE: Tensor) -> Tensor:
        """How far these keys and values move the outputs of the queries: fp32 `[B, H]`.

        The mean of |o' − o| / |o|.
        """
        exact_BHME = self.attention_BHMS @ self.value_BHSE.float()
        moved_BHME = self._attention(key_BHSD) @ value_BHSE.float() - exact_BHME
        length_BHM = exact_BHME.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        error_BH: Tensor = (moved_BHME.norm(dim=-1) / length_BHM).mean(-1)
        return error_BH

    def _attention(self, key_BHSD: Tensor) -> Tensor:
        batch, heads, _, width = key_BHSD.shape
        queries = self.query_BNQD.shape[2]
        query_BHMD = self.query_BNQD.float().reshape(batch, heads, -1, width)
        logits = query_BHMD @ key_BHSD.float().mT * self.scaling
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        own_Q = torch.arange(queries, device=key_BHSD.device) - queries
        own_BQ = self.seen_B.to(key_BHSD.device)[:, None] + own_Q
        seen = self.position_BHS[:, :, None] <= own_BQ[:, None, :, None]
        hidden_BHQS = ~(seen & self.held_BHS[:, :, None])
        groups = query_BHMD.shape[2] // queries
        hidden_BHMS = hidden_BHQS.repeat(1, 1, groups, 1)  # M = g·W + w
        return logits.masked_fill(hidden_BHMS, -torch.inf).softmax(-1)


def layouts(
    packing: Packing | None,
    widths: tuple[int, int],
    kept: tuple[int, int],
    item_bytes: int,
    short: bool,
    page: int | None = None,
) -> list[PageLayout]:
    """How old pages lie in memory, by the number that `format_of` gives a row.

    short: whether there are short rows. page: slots of a page, where that is not left to the bits.
    """
    rule = packing or Packing()
    bits = [(rule.key_bits, rule.value_bits)]
    if guards(packing):
        bits.append((max(WIDE, rule.key_bits), max(WIDE, rule.value_bits)))
    sizes = [page_slots(packing), *([short_slots(packing)] if short else [])]
    if page is not None:
        sizes = [_fitting(packing, page)]
    return [
        PageLayout(
            slots, *widths, *kept, *pair, min(rule.key_group, slots), rule.value_group, item_bytes
        )
        for slots in sizes
        for pair in bits
    ]


def format_of(packing: Packing | None, wide_BH: Tensor, short_BH: Tensor) -> Tensor:
    """The number of the layout of each row: int64.

    wide_BH: rows that the guard keeps at 8 bits. short_BH: rows in smaller pages.
    """
    return wide_BH.long() + (1 + guards(packing)) * short_BH.long()


def guards(packing: Packing | None) -> bool:
    """Whether rows may be kept at 8 bits instead of fewer."""
    if packing is None or packing.bound is None:
        return False
    return min(packing.key_bits, packing.value_bits) < WIDE


def page_slots(packing: Packing | None) -> int:
    """Slots of an old page: a whole group of keys."""
    rule = packing or Packing()
    if min(rule.key_bits, rule.value_bits) == 16:
        return _RAW_SLOTS
    return _SLOTS if rule.key_bits == 16 else math.lcm(_SLOTS, rule.key_group)


def _fitting(packing: Packing | None, page: int) -> int:
    """Slots of a page that was asked for: whole groups of keys, where these are quantised."""
    group = (packing or Packing()).key_group
    return page if page <= group else -(-page // group) * group


def short_slots(packing: Packing | None) -> int:
    """The same of short rows, whose keys share their steps with fewer others.

    Of n slots, n/p pages cost as many steps, while p/2 slots wait for a page at full width: the
    best p grows with the square root of n. A page of 32 is the better one below about 600 slots.
    """
    rule = packing or Packing()
    return min(page_slots(packing), max(_RAW_SLOTS, _UNIT // rule.key_bits))
