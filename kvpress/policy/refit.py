"""How the slots that stay are fitted to what all slots gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvpress.errors import PolicyError
from kvpress.policy.budget import Limits


class Refit(NamedTuple):
    """The rule of a fit; see kvpress/formulas/fitting.py.

    bias: bounds of the weight e^β of a slot in the softmax; None: all weigh as they did. values:
    whether values are fitted. ridge: how much it costs to leave a slot's own value, in multiples of
    the largest eigenvalue of the weights' products. part: masses and outputs are those of the
    slots that may go alone (the paper), not of all slots. held_out: of so many queries one is not
    fitted but decides, row by row, whether the fit is better than the slots as they are; 0: it is.
    share, tokens, piece: how much of a text is read again, at the most both, and in which pieces.
    """

    bias: tuple[float, float] | None = (math.exp(-3), math.exp(7))
    values: bool = True
    ridge: float = 1e-3
    part: bool = False
    held_out: int = 8
    share: float = 0.125
    tokens: int = 512
    piece: int = 64

    def check(self) -> None:
        """Raises PolicyError for a rule that fits nothing, or cannot be."""
        if self.bias is None and not self.values:
            raise PolicyError("A refit of neither biases nor values changes nothing. Fit one.")
        if self.bias is not None and not 0 < self.bias[0] <= 1 <= self.bias[1] < math.inf:
            raise PolicyError(f"Bounds {self.bias} of weights must be above 0, with 1 in between.")
        if not 0 <= self.ridge < math.inf or self.held_out < 0 or self.held_out == 1:
            raise PolicyError(
                f"ridge={self.ridge} must be 0 or more, held_out={self.held_out} 0 or above 1."
            )

    def check_beside(self, limits: Limits | None, formats: bool, recipe: str) -> None:
        """Raises PolicyError where nothing goes, or something goes later, or is packed.

        formats: whether old slots keep fewer channels or bits.
        """
        if limits is None:
            raise PolicyError(
                f"{recipe} fits what stays to what goes, but there is no budget. Combine it with a"
                " policy that has one."
            )
        if limits.interval:
            raise PolicyError(
                f"{recipe}: fitted values of slots depend on each other, so that none can go while"
                " decoding. Give interval=0."
            )
        if self.bias is not None and formats:
            raise PolicyError(
                f"{recipe}: fitted biases ride in a channel of keys, which packed slots do not"
                " have. Fit the values alone (bias=false)."
            )

    def reference(self, ids: Sequence[int], room: int) -> list[int]:
        """The tokens of a text that are read again, in pieces that are spread over it.

        room: how many may be read.
        """
        wanted = max(1, min(self.tokens, room, math.ceil(self.share * len(ids))))
        pieces = math.ceil(wanted / self.piece)
        ends = [round(len(ids) * (i + 1) / pieces) for i in range(pieces)]
        sizes = [wanted * (i + 1) // pieces - wanted * i // pieces for i in range(pieces)]
        return [x for end, size in zip(ends, sizes, strict=True) for x in ids[end - size : end]]
