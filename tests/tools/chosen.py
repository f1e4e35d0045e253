"""A decode step that chooses pages of several parts, for tests of operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from packing import Part, layout_of, make_part
from torch import Tensor

from kvpress.ops import Choice, Logits, Old, Pages, implementation

BATCH, HEADS, GROUP, WIDTH, SLOTS = 2, 2, 3, 24, 32
ROWS, PAGE, LOGITS = BATCH * HEADS, 16, Logits(WIDTH**-0.5)
HELD = {0: [], 1: [[5, 0, 9, 7]], 2: [[5, 0, 9, 7], [0, 6, 2, 0]]}  # pages of rows in each part


class Step(NamedTuple):
    """What a step is given."""

    query_BN1D: Tensor
    pages: Pages
    parts: list[Part]
    judged: list[Tensor]
    seen_B: Tensor

    def operands(
        self, bits: int, candidates: int, slots: list[int], device: str = "cpu"
    ) -> tuple[Any, ...]:
        """The operands of `decode_chosen`."""
        tensors = [tensor.to(device) for part in self.parts for tensor in part.tensors]
        old = Old(tensors, [size for part in self.parts for size in part.layout])
        pages, judged = Pages(*(x.to(device) for x in self.pages)), self.judged
        given = (pages, LOGITS, old, [x.to(device) for x in judged], self.seen_B.to(device))
        return (self.query_BN1D.to(device), *given, slots, Choice(4, 50, bits, candidates))


def step_of(parts: int, bits: int) -> Step:
    """A step over so many parts, with cells of so many bits."""
    own = []
    for number, held in enumerate(HELD[parts]):
        layout = layout_of(*((16, 16), (4, 2))[number], (WIDTH,) * 2, (WIDTH,) * 2, torch.float32)
        layout = layout._replace(slots=SLOTS, key_group=32, value_group=32)
        own.append(make_part(layout, held, torch.float32, holes=False))
    judged = []
    for part in own:
        like = torch.empty(0)
        bounds = implementation("page_bounds", "reference")
        made = bounds(part.tensors[0], *part.channels, list(part.layout), like, bits)
        first_P = torch.randint(0, 300, (len(made[0]), 1))
        judged += [*made, torch.cat([first_P, first_P + SLOTS], 1).int()]
    recent = 3 * PAGE
    pages = Pages(
        torch.randn(ROWS * 3, WIDTH, PAGE),
        torch.randn(ROWS * 3, PAGE, WIDTH),
        torch.randperm(ROWS * 3).view(ROWS, 3).int(),
        torch.tensor([recent, 1, 17, 30]),
    )
    query_BN1D = torch.randn(BATCH, HEADS * GROUP, 1, WIDTH) * 3
    return Step(query_BN1D, pages, own, judged, torch.tensor([340, 280]))
