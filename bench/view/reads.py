"""Which of the tokens that a layer holds its last decode step read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpress.pipe.state import ledger
from kvpress.pipe.state.layer import Layer
from kvpress.store.base import POSITION
from kvpress.store.chosen import Chosen
from kvpress.types import EMPTY


def read_positions(layer: Layer) -> list[list[int]] | None:
    """The sorted positions that every KV head of the first sequence read.

    None where a step reads everything, or none was made.
    """
    if layer.reads.last is None:
        return None
    group, found = layer.reads.last
    if group is not None and 0 not in group:
        return None
    first = 0 if group is None else list(group).index(0)
    made = []
    for head in range(layer.kind.heads):
        row = first * layer.kind.heads + head
        missed = set[int]()
        for chosen in found.chosen:
            missed |= _missed(layer, chosen, row, head, found.read_r)
        kept = ledger.kept_positions(layer, 0, head)
        made.append([position for position in kept if position not in missed])
    return made


def _missed(layer: Layer, chosen: Chosen, row: int, head: int, read_r: Tensor) -> set[int]:
    """Positions in the pages of one part that were not chosen.

    Pages that were filled after the step held recent slots when it was made, which are always read.
    """
    part, size = chosen.part, chosen.part.layout.slots
    pages = int(chosen.pages_r[row])
    recent = int(read_r[row]) - pages * size
    now = int(layer.rows.aging.recent.counts[head]) if layer.rows.aging is not None else recent
    before = int(part.counts[head]) - max(0, recent - now)
    places = set(range(before // size)) - set(chosen.place_rW[row, :pages].tolist())
    position_S: Any = part.dense(POSITION, [0])[0, head].cpu()
    return {
        position
        for place in places
        for position in position_S[place * size : (place + 1) * size].tolist()
        if position != EMPTY
    }
