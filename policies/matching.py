"""Kept slots that stand for those that went (Attention Matching, Zweiger et al., arXiv 2602.16284).

1. A part of the prompt is read again behind it. Its queries are the reference, layer by layer: each
   sees what earlier layers have left (on-policy).
2. The slots that another policy selects keep their keys. A bias β per slot, e^β by bounded least
   squares, gives them the attention mass of all.
3. Their values are solved for by least squares, so that the output is that of all slots. β is
   rounded to the dtype of the cache first.

Combines with any policy that selects: `kvzip+matching`, `snapkv+heads+matching`.

Differs from the paper: masses and outputs are those of the whole attention, sinks and protected
tokens included, since a head that looks at its sink changes little (`part` fits the rest alone);
values are drawn to the slot's own (`ridge`; the paper: none); a row keeps its slots as they were,
or without biases, where queries that were held out say so; β may reach 7 rather than 3, which many
slots for each that stays need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvpress.policy import Policy, Refit, option


@dataclass(frozen=True, kw_only=True)
class Matching(Policy):
    bias: bool = option(True, "whether slots get a bias; not with packed slots")
    values: bool = option(True, "whether values are fitted")
    ridge: float = option(1e-3, "how much values are drawn to what they were", low=0)
    least: float = option(-3.0, "of a bias (paper: -3)", high=0)
    most: float = option(
        7.0, "of a bias (paper: 3; by orthogonal matching pursuit 7)", low=0, high=80
    )
    part: bool = option(False, "fits the slots that may go alone (paper), not the whole attention")
    held_out: int = option(8, "of so many queries one judges the fit; 0: none does (paper)", low=0)
    again: float = option(
        0.125, "share of the prompt that is read again, at the most", low=0, high=1
    )
    tokens: int = option(512, "tokens that are read again, at the most", low=1)
    piece: int = option(64, "tokens of a piece of them; pieces are spread over the prompt", low=1)

    def absorb(self) -> Refit:
        bounds = (math.exp(self.least), math.exp(self.most)) if self.bias else None
        read = (self.again, self.tokens, self.piece)
        return Refit(bounds, self.values, self.ridge, self.part, self.held_out, *read)
