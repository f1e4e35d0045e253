"""How a page of old slots lies in memory: fewer channels, fewer bits.

A page is one run of bytes, whose parts begin at multiples of 16:

    key codes      pairs of kept channels × slots; groups run along the tokens
    key scales     [S/g, 2, T]    fp16: step, then zero
    value codes    pairs of slots × kept channels
    value scales   [2, U/g, S]    fp16: step, then zero; groups of g channels

A code c stands for `step · c + zero`. A vector is 16 codes: 8 neighbouring lines (slots of keys,
channels of values), each of a pair (of channels of keys, of slots of values) side by side, as
instructions multiply and add them. 16 / bits vectors are a unit of 16 words of 16 bits: the first
one in the lowest bits of each word. With 16 bits numbers are stored as they came, keys `[C, S]` and
values `[S, U]`, and there are no scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.errors import OperatorError
from kvpress.types import MOST_CODED

BITS = (16, 8, 4, 2)
LINES = 8  # of a vector
MOST_SIZE = 1 << 20  # beyond which the bytes of pages could not be counted
_ALIGNED = 16  # bytes
_WORDS = 16  # of a unit


class PageLayout(NamedTuple):
    """The sizes of which every offset in a page follows.

    item_bytes: of a number of "16 bits", which stands for the dtype of the store, wider or not.
    """

    slots: int  # S
    key_width: int  # D, of the model
    value_width: int  # E, of the model
    key_kept: int  # T
    value_kept: int  # U
    key_bits: int
    value_bits: int
    key_group: int  # tokens that share a step of a key channel
    value_group: int  # channels that share a step of a value
    item_bytes: int

    def check(self, op: str) -> None:
        """Raises OperatorError for a layout that kernels cannot read."""
        slots, group = self.slots, self.key_group
        if min(self) < 1 or max(self) > MOST_SIZE:
            why = f"every size must be 1 to {MOST_SIZE}"
        elif slots % (32 if min(self.key_bits, self.value_bits) < 16 else 16):
            why = "slots must be a multiple of 32, of 16 where nothing is quantised"
        elif group % 32 or slots % group or self.value_group % 32:
            why = "groups must be multiples of 32, and slots one of key_group"
        elif self.value_kept > self.value_width or self.boosted > self._boostable:
            why = "more channels are kept than there are"
        elif max(self.key_width, self.value_width, self.key_kept) > MOST_CODED:
            why = f"heads have at most {MOST_CODED} channels"
        elif self.item_bytes not in (2, 4):
            why = "numbers have 2 or 4 bytes"
        elif self.key_bits not in BITS or self.value_bits not in BITS:
            why = f"bits must be {', '.join(map(str, BITS))}"
        else:
            return
        raise OperatorError(f"kvpress::{op}: {self}: {why}.")

    @property
    def boosted(self) -> int:
        """Key channels that have two codes: they are kept twice, the second time behind all."""
        return max(0, self.key_kept - self.key_width)

    @property
    def apart(self) -> PageLayout:
        """The same page, where both codes of such a channel are numbers of channels of their own.

        These numbers are fp32.
        """
        return self._replace(key_width=self.key_kept, item_bytes=4)

    @property
    def _boostable(self) -> int:
        """How many of them there may be at most."""
        return self.key_width if self.key_bits < 16 else 0

    @property
    def value_groups(self) -> int:
        """Steps of one slot."""
        return -(-self.value_kept // self.value_group)

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """Where key scales, value codes and value scales begin, and where they end."""
        keys = self.key_kept * self.slots * self.item_bytes
        if self.key_bits < 16:
            keys = _code_bytes(-(-self.key_kept // 2), self.slots, self.key_bits)
        key_scales = _up(keys, _ALIGNED)
        steps = self.key_kept * (self.slots // self.key_group) if self.key_bits < 16 else 0
        value_codes = _up(key_scales + 4 * steps, _ALIGNED)
        values = self.slots * self.value_kept * self.item_bytes
        if self.value_bits < 16:
            values = _code_bytes(self.slots // 2, self.value_kept, self.value_bits)
        value_scales = _up(value_codes + values, _ALIGNED)
        steps = self.slots * self.value_groups if self.value_bits < 16 else 0
        return key_scales, value_codes, value_scales, value_scales + 4 * steps

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, so that the next one begins at a multiple of 16."""
        return _up(self.offsets[3], _ALIGNED)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _code_bytes(pairs: int, lines: int, bits: int) -> int:
    vectors = pairs * -(-lines // LINES)
    return _up(vectors, 16 // bits) * _WORDS * bits // 8


def to_bytes(code_PXg: Tensor, bits: int) -> Tensor:
    """The bytes of codes: X is the axis of pairs, Y that of lines. uint8 `[P, bytes]`."""
    pages, pairs, lines = code_PXg.shape
    code_PXg = torch.nn.functional.pad(code_PXg, (0, -lines % LINES, 0, pairs % 2))
    sizes = (pages, -(-pairs // 2), 2, -(-lines // LINES), LINES)
    vector_PXw = code_PXg.reshape(sizes).permute(0, 1, 3, 4, 2).reshape(pages, -1, _WORDS)
    fields = 16 // bits
    vector_PXw = torch.nn.functional.pad(vector_PXw, (0, 0, 0, -vector_PXw.shape[1] % fields))
    shift_f1 = torch.arange(fields, device=code_PXg.device, dtype=torch.int32)[:, None] * bits
    word_Puw = (vector_PXw.view(pages, -1, fields, _WORDS).int() << shift_f1).sum(2)
    return torch.stack([word_Puw & 255, word_Puw >> 8], -1).flatten(1).to(torch.uint8)


def from_bytes(data_PX: Tensor, pairs: int, lines: int, bits: int) -> Tensor:
    """The codes that `to_bytes` made bytes: uint8 `[P, X, Y]`."""
    fields, blocks = 16 // bits, -(-lines // LINES)
    word_Puw = data_PX.int().view(len(data_PX), -1, _WORDS, 2)
    word_Pu1w = (word_Puw[..., 0] | word_Puw[..., 1] << 8)[:, :, None]
    shift_f1 = torch.arange(fields, device=data_PX.device, dtype=torch.int32)[:, None] * bits
    vector_PXw = (word_Pu1w >> shift_f1 & (2**bits - 1)).flatten(1, 2)
    vectors = -(-pairs // 2) * blocks
    code = vector_PXw[:, :vectors].reshape(len(data_PX), -1, blocks, LINES, 2)
    code_PXg = code.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    codes: Tensor = code_PXg[:, :pairs, :lines].to(torch.uint8)
    return codes


def parts_of(
    op: str, old: Sequence[Tensor], layouts: Sequence[int]
) -> list[tuple[PageLayout, Sequence[Tensor]]]:
    """The parts of old slots that operators take as flat lists. Raises OperatorError."""
    sizes, tensors = len(PageLayout._fields), len(PART)
    if len(layouts) % sizes or len(old) * sizes != len(layouts) * tensors:
        raise OperatorError(
            f"kvpress::{op}: {len(old)} tensors and {len(layouts)} sizes of old slots; each part"
            f" has {tensors} ({', '.join(PART)}) and {sizes}."
        )
    if len(layouts) > MOST_PARTS * sizes:
        raise OperatorError(
            f"kvpress::{op}: {len(layouts) // sizes} parts of old slots; at most {MOST_PARTS} are"
            " supported."
        )
    parts = []
    for i in range(len(layouts) // sizes):
        layout = checked(op, layouts[sizes * i : sizes * (i + 1)])
        parts.append((layout, old[tensors * i : tensors * (i + 1)]))
    return parts


def checked(op: str, sizes: Sequence[int]) -> PageLayout:
    """The layout of these sizes. Raises OperatorError for one that kernels cannot read."""
    if len(sizes) != len(PageLayout._fields):
        raise OperatorError(
            f"kvpress::{op}: layout has {len(sizes)} sizes, not {len(PageLayout._fields)}:"
            f" {', '.join(PageLayout._fields)}."
        )
    layout = PageLayout(*sizes)
    layout.check(op)
    return layout


# The tensors of a part: pages uint8 [P, bytes]; kept channels int16 [R, T] and [R, U]; page table
# int32 [R, W]; slots int64 [R], dropped ones included; positions int32 [P, S], EMPTY where a slot
# was dropped; mass fp32 [P, S]; dropped slots int64 [R]. The last three may be empty: nothing was
# dropped, nothing is accumulated.
PART = ("pages", "key_channels", "value_channels", "table", "counts", "position", "mass", "dropped")
MOST_PARTS = 4
SPAN = 64  # the columns that weights give a part are a multiple of this


def span(layout: PageLayout, table_width: int) -> int:
    """Columns that a part has in weights."""
    return -(-table_width * layout.slots // SPAN) * SPAN
