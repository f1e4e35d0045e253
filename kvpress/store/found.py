"""What a decode step read of stored pages, and what it may have missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvpress import host
from kvpress.store.chosen import Chosen, Looked, Wanted
from kvpress.store.moves import Moves

_CODES = 2.0**-10  # an LSE over quantised slots is right to that: their factors have 16 bits


class Found(NamedTuple):
    """What a step read.

    recent: slots of each row that were read because they are in no page yet, of `slot_bytes` each.
    mass_bN: ln of what the exponentials of all that was missed sum to, at the most; lse_bN: of what
    all that was read sums to; fp32. length_r: of the longest value missed. looked: at what, of
    every part. short: rows that read all they may and were not certified. certified: whether what
    was missed is bounded at all. unsure: rows whose pages no head chose, since it was not sure.
    moves: what had to be loaded, where pages may be elsewhere than on the device.
    """

    out_bN1E: Tensor
    lse_bN: Tensor
    mass_bN: Tensor
    length_r: Tensor
    recent: Sequence[int]
    slot_bytes: int
    chosen: Sequence[Chosen]
    looked: Sequence[Looked]
    short: int = 0
    certified: bool = True
    unsure: int = 0
    moves: Moves = Moves()

    def having(self, moves: Moves) -> Found:
        """The same of a step that had to load so much."""
        return self._replace(moves=moves)

    def counted(self) -> Found:
        """The same without what its figures do not need."""
        chosen = [own.counted() for own in self.chosen]
        return self._replace(out_bN1E=self.lse_bN, length_r=self.lse_bN, chosen=chosen)

    @property
    def error_bN(self) -> Tensor:
        """No query head missed a larger share of its attention: see `share_missed`."""
        return share_missed(self.mass_bN, self.lse_bN, self.chosen)

    @property
    def move_bN(self) -> Tensor:
        """The output of no query head moved by more than that: fp64."""
        batch, heads = self.lse_bN.shape
        length_bN = self.length_r.view(batch, -1).repeat_interleave(
            heads * batch // len(self.length_r), 1
        )
        norm_bN: Tensor = self.out_bN1E[:, :, 0].float().norm(dim=-1)
        return self.error_bN * (length_bN + norm_bN)

    @property
    def read_r(self) -> Tensor:
        """Tokens that rows read: int64, on the device."""
        read_r: Tensor = host.tensor(self.recent).to(self.lse_bN.device)
        for own in self.chosen:
            read_r = read_r + own.pages_r * own.part.layout.slots
        return read_r

    @property
    def bytes_r(self) -> Tensor:
        """Their bytes, with those of boxes and cells: int64, on the device."""
        recent_r = host.tensor(self.recent).to(self.lse_bN.device)
        bytes_r: Tensor = recent_r * self.slot_bytes + sum(x.box_bytes for x in self.looked)
        for x in self.looked:
            if x.judged_r is not None:
                bytes_r = bytes_r + x.judged_r * x.cell_bytes
        for own in self.chosen:
            bytes_r = bytes_r + own.pages_r * own.part.layout.page_bytes
        return bytes_r


def share_missed(mass_bN: Tensor, lse_bN: Tensor, chosen: Sequence[Chosen]) -> Tensor:
    """b / (z + b) from ln b and ln z: fp64, so that what is small is not 0.

    chosen: what z is of.
    """
    layouts = [own.part.layout for own in chosen]
    packed = any(min(layout.key_bits, layout.value_bits) < 16 for layout in layouts)
    share_bN = torch.sigmoid(mass_bN.double() - lse_bN.double() + (_CODES if packed else 0.0))
    return share_bN.nan_to_num(nan=1.0)  # of queries that are no numbers nothing is known


class Retrieving(Protocol):
    """Rows of which a decode step reads some pages only."""

    def attend_some(self, wanted: Wanted) -> tuple[Tensor, Tensor | None, Found]:
        """Attention output of one new query, weights where asked for, 0 where nothing was read.

        Raises TierError where a page cannot be read.
        """

    def foresee(self, wanted: Wanted) -> list[tuple[Any, Tensor]]:
        """Rows, and pages that a step will most likely choose whose queries are not known yet."""
