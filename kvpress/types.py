"""The words and the shape legend of the engine.

`key_BHSD` is a tensor indexed by sequence, KV head, slot and channel: `LEGEND` says what each
letter counts. A small letter is a part of what its capital counts, or a group of it; a digit is a
dimension of that length.

row: one (sequence, KV head). slot: one stored token of a row. page: a fixed number of slots of one
row. position: the index of a token among the real tokens of its sequence (padding has none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LEGEND = {
    "B": "sequence of a batch",
    "L": "layer",
    "H": "KV head",
    "G": "query head of a KV head",
    "N": "query head, N = H·G",
    "R": "row, R = B·H",
    "P": "page",
    "W": "place in a page table: page of a row",
    "S": "slot",
    "K": "slot that stays, of an eviction",
    "V": "slot that goes, of an eviction",
    "Q": "new token, as a query or with its key and value",
    "M": "query of a query group, M = G·Q",
    "T": "token of a text",
    "D": "channel of a key, and of a value where both are as wide",
    "E": "channel of a value, where it may be another number",
    "C": "kept channel of a key, or one that the engine adds",
    "U": "kept channel of a value",
    "F": "pair of channels that turn together (RoPE)",
    "I": "block of queries",
    "J": "block of slots",
    "Y": "word of the vocabulary",
    "A": "entry of a list: of addresses, pages, rows",
    "X": "anything else",
}
EMPTY = -1  # the position of a slot that holds no token
MOST_WIDTH = 640  # channels of a head
MOST_CODED = 256  # of one whose products with codes must fit into 16 and 32 bits: old pages

Turned = Literal["none", "values", "both"]  # what a Hadamard matrix turned
Rank = Literal["mass", "mass_per_age", "position"]  # what slots are ranked by
NoiseKind = Literal["none", "frozen", "fresh"]  # drawn never, once per key, per query and key
Reduced = Literal["sum", "max"]  # what weights of several queries become


@dataclass(frozen=True)
class LayerKind:
    """How a layer attends: to everything, or to a sliding window (then only that is kept).

    inline: whether the model computes attention by itself, without a function for it. slopes: of
    the ALiBi bias that this engine then adds, per query head. queries, width: query heads, and
    channels of a key of the model; 0: not known. latent: how many channels of a key are its value
    as well, from which those of the heads follow; 0: values are apart. readers: how many layers
    behind this one read its keys and values. sink: whether a learned logit of every query
    head takes part in each softmax. first, whole: where other processes have the rest of the heads,
    which KV head of the layer is the first one here, and how many there are in all; 0: these.
    """

    index: int
    heads: int  # KV heads
    window: int | None = None
    inline: bool = False
    slopes: tuple[float, ...] | None = None
    queries: int = 0
    width: int = 0
    latent: int = 0
    readers: int = 0
    sink: bool = False
    first: int = 0
    whole: int = 0

    @property
    def divided(self) -> bool:
        """Whether other processes have heads of this layer."""
        return self.whole > self.heads

    @property
    def of_all(self) -> int:
        """KV heads in all processes."""
        return self.whole or self.heads

    def own(self, every: Tensor, dim: int = 0) -> Tensor:
        """What belongs to the heads here, of a tensor for all KV heads or query heads."""
        if not self.divided:
            return every
        each = every.shape[dim] // self.whole
        return every.narrow(dim, self.first * each, self.heads * each)

    @property
    def name(self) -> str:
        """`full` or `sliding`."""
        return "full" if self.window is None else "sliding"


@dataclass(frozen=True)
class StateKind:
    """A layer that keeps something which no policy compresses.

    count: states of each sort that it may have. attends: whether it has keys and values, too, which
    policies may compress. chunk: tokens of a chunk, where it attends within those; then it keeps
    keys and values as transformers does. Neither: it keeps nothing.
    """

    index: int
    count: int
    attends: bool = False
    chunk: int = 0
