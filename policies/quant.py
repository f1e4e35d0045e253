"""Old keys and values in few bits, asymmetric (KIVI, Liu et al., ICML 2024, arXiv 2402.02750).

1. Keys are quantised per channel, in groups of tokens; values per token, in groups of channels.
2. x ≈ step · code + zero with codes from 0 to 2^bits − 1; zero is the least x of a group, step the
   least one that reaches the largest.
3. The last `residual` tokens stay as they came; tokens become old a group at a time.

Differs from the paper: values wait for the tokens of a group, as keys do; of short rows at most a
32nd stays as it came, and groups hold 32 tokens. `guard`: rows whose
attention output moves by more than this share on average over the last 32 queries are kept at 8
bits, since a few heads of some models do not stand fewer. `rotate` spreads large channels over all
(Hadamard, as QuaRot, arXiv 2404.00456): values lose a quarter of their error at no bytes; keys,
whose steps are per channel, gain less. Recent slots are stored turned, too: exact but for rounding,
which in half precision is one more of each value. `boost` (after Kitty, arXiv 2511.18643): the key
channels that the last queries need most, by mean q² · step², have twice the bits, of rows at 8
bits too.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Packing, Policy, PolicyError, Turned, option

BITS = (16, 8, 4, 2)
GROUPS = {16: 64, 8: 128, 4: 64, 2: 32}  # of tokens: coarser codes need smaller groups
VALUE_GROUPS = {16: 64, 8: 128, 4: 64, 2: 32}  # of channels


@dataclass(frozen=True, kw_only=True)
class Quant(Policy):
    key_bits: int = option(4, "bits of a key: 16 (as it came), 8, 4 or 2", low=2, high=16)
    value_bits: int = option(4, "bits of a value: 16, 8, 4 or 2", low=2, high=16)
    group: int | None = option(
        None, "numbers that share a step, multiple of 32; none: 128, 64, 32 at 8, 4, 2 bits", low=32
    )
    residual: int = option(32, "last tokens that stay as they came, at most a 32nd of a row", low=0)
    rotate: Turned = option(
        "none",
        "turns values, or keys and queries too, by a Hadamard matrix before they are stored",
        choices=("none", "values", "both"),
    )
    boost: float = option(
        0.0, "share of key channels with codes of twice the bits: 0.125 at 2 bits", low=0, high=0.5
    )
    guard: float | None = option(
        0.5, "error of a row's attention output above which it gets 8 bits; none: never", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in BITS:
                raise PolicyError(
                    f"{name}={getattr(self, name)}: allowed are {', '.join(map(str, BITS))}."
                )
        if self.boost and (self.rotate == "both" or 16 in (self.key_bits, self.value_bits)):
            raise PolicyError(
                f"boost={self.boost:g} needs keys that are not turned, and codes of keys and"
                " values: give key_bits and value_bits of 8, 4 or 2, and rotate=none or values."
            )
        if self.group is not None and (self.group % 32 or self.group > 256):
            raise PolicyError(f"group={self.group}: allowed are 32, 64, 96, … 256.")

    def pack(self) -> Packing | None:
        return Packing(
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            key_group=self.group or GROUPS[self.key_bits],
            value_group=self.group or VALUE_GROUPS[self.value_bits],
            bound=self.guard,
            window=32,
            rotate=self.rotate,
            boost=self.boost,
        )
