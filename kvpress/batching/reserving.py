"""Admission by compressed bytes: what a request will hold, by the functions of the ledger."""

from __future__ import annotations

from kvpress.errors import TooLargeError, UnsupportedModelError
from kvpress.pipe.plan.demand import Shape, Texts
from kvpress.pipe.plan.held import cache_bytes
from kvpress.policy.recipe import Recipe

_ID_BYTES = 4  # of an id that a cache has seen; it keeps them to tell what goes on from it
_ENDLESS = 2**62
_BESIDE = 2  # channels that may stand behind keys: of positions, and of counts
_IDS_AT_LEAST = 64  # bytes of the storage of one


class Reserving:
    """The bytes that are promised to requests under a cap; None: there is no cap.

    A request is admitted if all that it may ever hold finds room beside what is promised already:
    what is admitted always comes to its end. states: whether layers hold something else.
    """

    def __init__(self, shape: Shape, cap: int | None, chunk: int, states: bool = False) -> None:
        self._shape, self.cap, self._chunk = shape, cap, chunk
        widest = max(2 * kind.heads * (kind.width + _BESIDE) for kind in shape.kinds)
        # While a part of a prompt passes a layer, its new keys and values are there besides.
        self._passing = 0 if cap is None else chunk * widest * shape.dtype.itemsize
        self.promised = self._passing
        item = shape.dtype.itemsize
        self._token = sum(2 * kind.heads * kind.width * item for kind in shape.kinds)
        shared = any(kind.readers for kind in shape.kinds)
        if cap is not None and (states or shared):
            what = "hold states besides" if states else "read those of others"
            raise UnsupportedModelError(
                "device= counts keys and values before they are there, but layers of this model"
                f" {what}. Leave device= out, and limit most_running instead."
            )

    def bytes_of(self, recipe: Recipe, prompt: int, new: int) -> int:
        """The most that a text holds at any time. Raises BudgetError."""
        texts = Texts(1, prompt + new, new)
        found = cache_bytes(self._shape, recipe, texts, min(self._chunk, prompt))
        ids = new * _IDS_AT_LEAST + prompt * _ID_BYTES
        return found.held + found.waiting + ids

    def full(self, tokens: int) -> int:
        """Bytes of so many tokens in transformers' own cache: all of them, in every layer."""
        return tokens * self._token

    def check(self, needed: int, what: str) -> None:
        """Raises TooLargeError for a request that could never be admitted."""
        if self.cap is not None and needed + self._passing > self.cap:
            raise TooLargeError(
                f"{what} may come to hold {needed:,} bytes of keys and values, beside"
                f" {self._passing:,} that reading takes, but device= allows {self.cap:,} for all"
                " requests together. Ask for fewer tokens or a smaller budget, or raise device=."
            )

    def fits(self, needed: int) -> bool:
        """Whether there is room for so much more."""
        return needed <= self.free

    @property
    def free(self) -> int:
        """Bytes that are not promised."""
        return _ENDLESS if self.cap is None else self.cap - self.promised

    def promise(self, needed: int) -> None:
        """Takes bytes out of what is free."""
        self.promised += needed

    def give_back(self, needed: int) -> None:
        """The contrary."""
        self.promised -= needed
