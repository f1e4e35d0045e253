"""What a policy is shown: where a layer is in its sequence, and the slots of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from kvpress.formulas.hadamard import turned
from kvpress.formulas.norms import output_norms
from kvpress.formulas.rotation import Rotation
from kvpress.types import Turned

Need = Literal["query", "rotation", "words", "output"]


class Queries(NamedTuple):
    """The queries of a prompt chunk, as attention saw them, and what attention does with them."""

    query_BNQD: Tensor  # of the last Q tokens seen, rotated
    scaling: float
    softcap: float


class Step(NamedTuple):
    """Where a layer is in its sequence when a policy is asked what it needs."""

    layer: int
    decoded: int  # tokens decoded since the last prompt; 0 while a prompt is processed
    new_tokens: int  # tokens of this prompt chunk, or 1 while decoding
    horizon: int  # tokens that the caller expects to decode


def _itself(own_BHX: Tensor) -> Tensor:
    return own_BHX


@dataclass(frozen=True)
class Slots:
    """What the stages see of one layer: rows of slots, dense and padded with empty slots.

    Slots are in increasing position order after a prompt and in any order while decoding. Keys and
    values are copied from the pages only when they are asked for.
    """

    layer: int
    position_BHS: Tensor  # int64; EMPTY where there is no token
    seen_B: Tensor  # int64: real tokens so far, the new ones included
    new_tokens: int  # tokens of this prompt chunk, or 1 while decoding
    fetch: Callable[[str], Tensor]  # a column of the store by name, dense
    attention_BHS: Tensor | None = None  # fp32: what the policy asked to observe
    mass_BHS: Tensor | None = None  # fp32: what the policy accumulated so far; 0 for new tokens
    key_width: int | None = None  # channels of keys, where the store keeps more than the model's
    attention_BNS: Tensor | None = None  # what was observed of a prompt, for every query head
    turned: Turned = "none"  # what the store keeps turned; see `Packing`
    asked: Queries | None = None  # of a prompt where the policy needs "query"; or see `watched`
    rotation: Rotation | None = None  # how keys turn with positions, where the policy needs that
    gram_NEF: Tensor | None = None  # WᵀW of the output projection, where the policy needs that
    calibrated: Mapping[str, Tensor] = field(default_factory=dict)  # what the policy must know
    gather: Callable[[Tensor], Tensor] = _itself  # see `of_all_heads`
    first: int = 0  # number of the first KV head in the layer: other processes may have the rest

    def of_all_heads(self, own_BHX: Tensor) -> Tensor:
        """A tensor with the KV heads that other processes have, too: `[B, H, ...]`.

        For policies that say `joins_heads`: then all processes ask at the same time.
        """
        return self.gather(own_BHX)

    @property
    def key_BHSD(self) -> Tensor:
        """The keys of all slots, rotated at their own positions."""
        key_BHSD = self.fetch("key")[..., : self.key_width]
        return turned(key_BHSD) if self.turned == "both" else key_BHSD

    @property
    def value_BHSD(self) -> Tensor:
        """The values of all slots."""
        value_BHSD = self.fetch("value")
        return value_BHSD if self.turned == "none" else turned(value_BHSD)

    @property
    def output_norms_BNS(self) -> Tensor:
        """|W v| of the values, W being what a query head has of the output projection: fp32."""
        if self.gram_NEF is None:
            raise LookupError('No projection is known: say needs = frozenset({"output"}).')
        return output_norms(self.value_BHSD, self.gram_NEF.to(self.position_BHS.device))

    @property
    def queries(self) -> Queries:
        """The queries of the prompt, or the last ones while decoding, if the policy needs them."""
        if self.asked is None:
            raise LookupError(
                'No queries are known: say needs = frozenset({"query"}) in the policy, and, to'
                " evict while decoding, `watched`: how many last ones."
            )
        return self.asked

    @property
    def observed_BHS(self) -> Tensor:
        """The observed attention, where the policy asked for it."""
        if self.attention_BHS is None:
            raise LookupError("No attention was observed: override `observe` in the policy.")
        return self.attention_BHS

    @property
    def kept_mass_BHS(self) -> Tensor:
        """The accumulated mass, where the policy keeps one."""
        if self.mass_BHS is None:
            raise LookupError(
                "No mass is kept with the slots: set `accumulates = True` in the policy."
            )
        return self.mass_BHS
