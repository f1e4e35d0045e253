"""Blocks of a prompt's attention: which exist, which are always computed, and their bit map.

A block is 64 queries × 32 slots. The map is a triangle: row i of it has one bit for every block
that query block i can see, the lowest bit of a byte first, and begins at a byte of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERIES, SLOTS = 64, 32  # of a block
SEGMENT = 4  # blocks that are examined together: how far the local area is rounded
MOST_CODE = 7  # queries and keys are estimated from codes −7 … 7
GROUPS = 4  # scales of a block's keys: those with n mod 8 in {2j, 2j + 1} share one


class Blocks(NamedTuple):
    """The blocks of `queries` new tokens, which own the last of `slots` slots."""

    queries: int  # P
    slots: int  # S

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.queries // QUERIES)

    @property
    def columns(self) -> int:
        """Blocks of slots."""
        return -(-self.slots // SLOTS)

    def end(self, row: int) -> int:
        """How many blocks of slots the queries of a row see, the first one included."""
        last = (row + 1) * QUERIES + self.slots - self.queries
        return min(self.columns, -(-last // SLOTS))

    def first_local(self, row: int, local: int) -> int:
        """The first block of the local area, of at least `local` slots, or 0: all of it is local.

        The last block always is: it may not be whole. Blocks 1 … first_local − 1 are examined, a
        multiple of `SEGMENT` of them.
        """
        end = self.end(row)
        segments = -(-(end - 1) // SEGMENT)
        excess = segments * SEGMENT - (end - 1)
        least = max(1, -(-local // SLOTS))
        segments -= -(-(least + excess) // SEGMENT)
        return 1 + segments * SEGMENT if segments > 0 else 0

    @property
    def offsets(self) -> list[int]:
        """The byte at which every row of the map begins, and the number of all bytes."""
        offsets = [0]
        for row in range(self.rows):
            offsets.append(offsets[-1] + -(-self.end(row) // 8))
        return offsets

    def tables(self, local: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`offsets` without the last, `end` and `first_local` of every row: int32 `[I]` each."""
        rows = [(self.end(row), self.first_local(row, local)) for row in range(self.rows)]
        numbers = torch.tensor(rows, dtype=torch.int32, device=device)
        begin = torch.tensor(self.offsets[:-1], dtype=torch.int32, device=device)
        return begin, numbers[:, 0].contiguous(), numbers[:, 1].contiguous()

    @property
    def causal(self) -> int:
        """All blocks that some query sees."""
        return sum(self.end(row) for row in range(self.rows))

    def seen(self, device: torch.device | None = None) -> Tensor:
        """True for the blocks that exist: bool `[I, J]`."""
        end_I1 = torch.tensor(
            [[self.end(row)] for row in range(self.rows)], device=device, dtype=torch.int64
        )
        return torch.arange(self.columns, device=device) < end_I1

    def always(self, local: int, device: torch.device | None = None) -> Tensor:
        """True for the blocks that are computed in any case, the first one and local ones."""
        column_J = torch.arange(self.columns, device=device)
        first = [[self.first_local(row, local)] for row in range(self.rows)]
        first_I1 = torch.tensor(first, device=device, dtype=torch.int64)
        return self.seen(device) & ((column_J == 0) | (column_J >= first_I1))


def to_map(computed_BNIJ: Tensor, blocks: Blocks) -> Tensor:
    """The bit map of blocks: uint8 `[B, N, X]`."""
    bit_8 = 1 << torch.arange(8, device=computed_BNIJ.device)
    rows = []
    for row in range(blocks.rows):
        own_BNj = computed_BNIJ[:, :, row, : blocks.end(row)].long()
        padded_BNj = torch.nn.functional.pad(own_BNj, (0, -own_BNj.shape[-1] % 8))
        bits_BNx8 = padded_BNj.view(*padded_BNj.shape[:2], -1, 8)
        rows.append((bits_BNx8 * bit_8).sum(-1).to(torch.uint8))
    return torch.cat(rows, dim=-1)


def from_map(map_BNX: Tensor, blocks: Blocks) -> Tensor:
    """True for the blocks of a bit map: bool `[B, N, I, J]`."""
    shape = (*map_BNX.shape[:2], blocks.rows, blocks.columns)
    computed_BNIJ = torch.zeros(shape, dtype=torch.bool, device=map_BNX.device)
    shift_8 = torch.arange(8, device=map_BNX.device)
    offsets = blocks.offsets
    for row in range(blocks.rows):
        byte_BNx1 = map_BNX[:, :, offsets[row] : offsets[row + 1], None].int()
        bits_BNj = (byte_BNx1 >> shift_8 & 1).flatten(-2).bool()
        computed_BNIJ[:, :, row, : blocks.end(row)] = bits_BNj[..., : blocks.end(row)]
    return computed_BNIJ


def computed_blocks(map_BNX: Tensor) -> Tensor:
    """How many blocks of each head are computed: int64 `[B, N]`."""
    ones_256 = torch.tensor(
        [bin(byte).count("1") for byte in range(256)], device=map_BNX.device, dtype=torch.int64
    )
    return ones_256[map_BNX.int()].sum(-1)


def of_slots(scale_BHJ4: Tensor, slots: int) -> Tensor:
    """The scale of every key from those of its block: `[B, H, S]`."""
    group_s = torch.arange(SLOTS, device=scale_BHJ4.device) % 8 // 2
    return scale_BHJ4[..., group_s].flatten(2)[:, :, :slots]
