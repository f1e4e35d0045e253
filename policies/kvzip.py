"""What a repetition of the context attends to (KVzip, Kim et al., NeurIPS 2025, arXiv 2505.23416).

1. The prompt is read and held whole. Then, chunk by chunk, the model reads an instruction to repeat
   it and the chunk itself; nothing of that stays.
2. A slot's score is the largest attention that a query of this reading gives to it, over the query
   group; its softmax runs over the sinks, the chunk and the reading (section 3).
3. The largest scores of all layers and heads stay. The question need not be known.

Differs from the paper: chunks of 2,048 tokens (code: 2,000), a tail shorter than a quarter of one
joins the chunk before; the softmax is in fp32 and counts are exact. Decoded tokens are looked at
with the next prompt. `scope=row` gives all rows the same, or what `heads` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpress.policy import (
    Budget,
    Observation,
    Policy,
    Pool,
    Probe,
    Rank,
    Slots,
    Step,
    Text,
    option,
)

FIRST = "\n\nRepeat the previous context exactly.\n\n"
FURTHER = "\n\nRepeat the part of the previous context exactly, starting with "


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    accumulates: ClassVar[bool] = True
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(4, "first tokens that always stay (port: 4)", low=0)
    interval: int = option(0, "decoded tokens between evictions", low=0, high=0)
    scope: Literal["model", "layer", "row"] = option(
        "model", "what rows compete in (paper: model)", choices=("model", "layer", "row")
    )
    least: float = option(0.0, "share of an equal budget for a row's own best", low=0, high=1)
    chunk: int = option(2048, "tokens that are repeated at once (code: 2000)", low=16)
    instruction: str | None = option(None, "said before the first chunk; none: the paper's words")
    further: str | None = option(None, "said before the others and their cue; none: the paper's")
    cue: int = option(8, "tokens of the chunk before that begin a further one (code: 8)", low=0)

    @property
    def rank(self) -> Rank:
        return "mass"

    @property
    def texts(self) -> Sequence[str]:
        given = ((self.instruction, FIRST), (self.further, FURTHER))
        return [own if text is None else text for text, own in given]

    def compete(self) -> Pool | None:
        return None if self.scope == "row" else Pool(self.scope, self.least)

    def probes(self, text: Text) -> Sequence[Probe]:
        (first, further), end = text.texts, len(text.ids)
        room = text.room - max(len(first), len(further) + self.cue)
        starts = list(range(text.first, end, max(1, min(self.chunk, room))))
        if len(starts) > 1 and end - starts[-1] < self.chunk // 4 and 4 * room >= 5 * self.chunk:
            starts.pop()
        made = []
        for start, stop in pairwise([*starts, end]):  # none where all of it is protected
            cue = (*further, *text.ids[start - self.cue : start]) if start > text.first else first
            made.append(Probe((*cue, *text.ids[start:stop]), start, stop))
        return made

    def observe(self, step: Step) -> Observation:
        return Observation(kind="max")

    def accumulate(self, slots: Slots) -> Tensor:
        return torch.maximum(slots.kept_mass_BHS, slots.observed_BHS)
