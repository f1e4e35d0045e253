"""What a retrieval head takes besides the cache, and for a while before each pass."""

from __future__ import annotations

from typing import NamedTuple

from kvpress.pipe.plan.demand import Shape, Texts
from kvpress.pipe.state.outlook import room
from kvpress.policy.heads import RetrievalHead
from kvpress.policy.recipe import Recipe

_ITEM = 4  # bytes: queries, keys and shares are in fp32
_IDS = 48  # bytes of a token: its id in 64 bits, by column and by position, and where it goes
_WEIGHED = 3  # logits, weights, and those of which some are masked


class Looking(NamedTuple):
    """A head in numbers. See `RetrievalHead`."""

    heads: int
    width: int
    group: int
    reach: int
    nbytes: int
    floats: int

    @classmethod
    def of(cls, head: RetrievalHead) -> Looking:
        """Those of a head that is there."""
        return cls(*(getattr(head, name) for name in cls._fields))

    @classmethod
    def like(cls, shape: Shape) -> Looking:
        """Those of a head whose weights nobody has seen: such as the layers of the model have."""
        kind = shape.tiered[0]
        width, queries = kind.width or 1, kind.queries or kind.heads
        channels = (queries + kind.heads) * width
        floats = 6 * shape.hidden + 12 * channels
        return cls(
            kind.heads, width, queries // kind.heads, 32, shape.hidden * channels * 4, floats
        )

    def held(self, texts: Texts) -> int:
        """Bytes of its weights, and of the keys and shares of all tokens."""
        tokens = room(texts.length) * self.width + texts.length
        return self.nbytes + texts.batch * self.heads * tokens * _ITEM

    def passing(self, texts: Texts, chunk: int) -> int:
        """The most bytes besides, while it reads a chunk or looks at all tokens."""
        keys = texts.batch * self.heads * self.width * texts.length * _ITEM
        # The keys before a growth are there besides; a look may copy all of them.
        reads = keys + texts.batch * (chunk + self.reach) * self.floats * _ITEM
        queries = texts.batch * self.heads * self.group
        looks = keys + _WEIGHED * queries * texts.length * _ITEM
        return max(reads, looks) + _IDS * texts.batch * texts.length


def asks(recipe: Recipe, shape: Shape) -> bool:
    """Whether a policy chooses by what a head looks at."""
    rules = (recipe.stage("retrieve").retrieve(kind.index) for kind in shape.tiered)
    return any(rule is not None and rule.head is not None for rule in rules)
