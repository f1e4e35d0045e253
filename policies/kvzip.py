"""What a repetition of the context attends to (KVzip, Kim et al., NeurIPS 2025, arXiv 2505.23416).

1. The prompt is read and held whole. Then, chunk by chunk, the model reads an instruction to repeat
   it and the chunk itself; nothing of that stays.
2. A slot's score is the largest attention that a query of this reading gives to it, over the query
   group; its softmax runs over the sinks, the chunk and the reading (section 3).
3. The largest scores of all layers and heads stay. The question need not be known.

Differs from the paper: chunks of 2,048 tokens (code: 2,000), a tail shorter than a quarter of one
joins the chunk before; the softmax is in fp32 and counts are exact; the turns of a chat are not
closed and opened around the instruction. Decoded tokens are looked at with the next prompt.
`scope=row` gives all rows the same, or what `heads` gives them. `whole=false` lets a chunk attend
to the sinks and itself, so that its cost does not grow with the text.
`normalise` is KVzip+ (arXiv 2601.07891). `structure` demotes punctuation that only gives a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kvpress.policy import (
    Budget,
    Need,
    Observation,
    Policy,
    Pool,
    Probe,
    Rank,
    Slots,
    Step,
    Text,
    option,
    repetitions,
    structural,
)

Scope = Literal["model", "layer", "row"]
FIRST = "\n\nRepeat the previous context exactly.\n\n"
FURTHER = "\n\nRepeat the part of the previous context exactly, starting with "


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    accumulates: ClassVar[bool] = True
    budget: Budget = option(0.5, "kept after prompts: fraction, tokens per row, or bytes")
    sink: int = option(4, "first tokens that always stay (port: 4)", low=0)
    interval: int = option(0, "decoded tokens between evictions", low=0, high=0)
    scope: Scope = option("model", "what rows compete in (paper: model)", choices=get_args(Scope))
    least: float = option(0.0, "share of an equal budget for a row's own best", low=0, high=1)
    whole: bool = option(True, "a chunk attends to all (paper), or to the sinks and itself alone")
    chunk: int = option(2048, "tokens that are repeated at once (code: 2000)", low=16)
    instruction: str | None = option(None, "said before the first chunk; none: as in the paper")
    further: str | None = option(None, "said before the others and their cue; none: the paper's")
    cue: int = option(8, "tokens of the chunk before that begin a further one (code: 8)", low=0)
    normalise: bool = option(False, "attention by what it adds to the hidden state (KVzip+)")
    structure: float = option(1.0, "factor for punctuation that comes often", low=0, high=1)
    repeats: int = option(16, "times that punctuation comes, at least, for `structure`", low=1)

    @property
    def rank(self) -> Rank:
        return "mass"

    @property
    def texts(self) -> Sequence[str]:
        given = ((self.instruction, FIRST), (self.further, FURTHER))
        return [own if text is None else text for text, own in given]

    def compete(self) -> Pool | None:
        return None if self.scope == "row" else Pool(self.scope, self.least)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"words"} if self.structure < 1 else ())

    def probes(self, text: Text) -> Sequence[Probe]:
        shaped = self.structure < 1
        part = structural(text.words(), self.repeats, self.structure) if shaped else None
        return repetitions(text, self.chunk, self.cue, not self.whole, part)

    def observe(self, step: Step) -> Observation:
        return Observation(kind="max", relative=self.normalise)

    def accumulate(self, slots: Slots) -> Tensor:
        return torch.maximum(slots.kept_mass_BHS, slots.observed_BHS)
