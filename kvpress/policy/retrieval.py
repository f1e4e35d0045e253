"""Which of the stored pages a decode step reads; the others are kept, and may be read later.

Pages are judged by the box of their keys: the least and the largest key of every channel bound the
logits of all of their slots (Tang et al., ICML 2024, arXiv 2406.10774).
"""

from __future__ import annotations

from typing import NamedTuple

from kvpress.errors import PolicyError
from kvpress.formulas import page_cells
from kvpress.policy.budget import Budget, share

GUESSES = ("step", "layer")
_SLOTS, _NARROW = 32, 64  # of a page, where keys have no more channels than that


class Retrieval(NamedTuple):
    """How a policy wants pages to be read.

    read: tokens that a row reads, at the most: a fraction of those that it holds, or a number.
    page: slots of a page; None: see `page_of`. cells: bits of the part of a box that a key is in:
    by them pages are judged that boxes name; 0: boxes alone judge. candidates: how many those are,
    times as many as may be read; None: all. sink, recent: first and last tokens that are always
    read. mass: read until no query head can miss more of its attention than this. top: read until
    the tokens with the largest logits of every query head are known, so many, and attend to those.
    tree: search boxes of boxes, not all of them. turn: choose by the query of the step before,
    whose pages are known earlier, unless the cosine of a row's queries with it is below this. head:
    choose by what a retrieval head looks at before the first layer: its name, or its file. sure:
    rows of which the head sees less than this share of its attention in what it chose choose by
    boxes. guess: by whose query is loaded, before a layer has its own, what it will most likely
    choose: that of the `step` before, or that which the input of the `layer` before makes. It
    decides when pages are there, never what is read.
    """

    read: Budget
    page: int | None = None
    cells: int = 0
    candidates: int | None = None
    sink: int = 0
    recent: int = 0
    mass: float | None = None
    top: int | None = None
    tree: bool = False
    turn: float | None = None
    head: str | None = None
    sure: float = 0.0
    guess: str | None = None

    def check(self) -> None:
        """Raises PolicyError for what cannot be."""
        if self.read.unit not in ("fraction", "tokens"):
            raise PolicyError(
                f"read={self.read}: allowed are a fraction of the tokens held (0.2) or a whole"
                " number of tokens per row (1024)."
            )
        if self.page is not None and self.page % 32:
            raise PolicyError(f"page={self.page}: allowed are multiples of 32.")
        if self.cells and self.cells not in page_cells.BITS:
            raise PolicyError(
                f"cells={self.cells}: allowed are 2 and 4 bits a channel of keys, and 0: pages are"
                " judged by their boxes alone."
            )
        if self.mass is not None and self.top is not None:
            raise PolicyError(
                f"mass={self.mass} and top={self.top} exclude each other: read until little is"
                " missed, or until the largest logits are known."
            )
        if self.head is not None and (self.mass is not None or self.top is not None or self.tree):
            raise PolicyError(
                f"head={self.head} chooses before queries are known, by which mass, top and tree"
                " choose. Leave them out."
            )
        self._check_guess()
        least = self.sink + self.recent
        if self.read.unit == "tokens" and self.read.amount < least:
            raise PolicyError(
                f"read={self.read}: sink={self.sink} and recent={self.recent} are always read,"
                f" which are {least} tokens. Read at least as many."
            )
        if self.turn is not None and (self.mass is not None or self.top is not None):
            raise PolicyError(
                f"turn={self.turn} chooses by another query than the one that mass and top certify."
                " Leave one of them out."
            )

    def _check_guess(self) -> None:
        if self.guess is None:
            return
        if self.guess not in GUESSES:
            raise PolicyError(f"guess={self.guess}: allowed are {', '.join(GUESSES)} and none.")
        if self.guess == "step" and self.turn is None:
            raise PolicyError(
                "guess=step: what the query of the step before chose is still there, but for a"
                " policy that reads it one step later. Use guess=layer, or leave it out."
            )
        others = {"turn": self.turn, "head": self.head, "mass": self.mass, "top": self.top}
        given = [f"{name}={x}" for name, x in others.items() if x is not None]
        if self.guess == "layer" and given:
            raise PolicyError(
                f"guess=layer guesses what a layer chooses by its own query, `read` tokens of it,"
                f" but {given[0]} chooses otherwise. Leave one of them out."
            )

    def page_of(self, width: int) -> int:
        """Slots of a page of keys with so many channels: more where each of them is larger."""
        return self.page or (_SLOTS if width <= _NARROW else 2 * _SLOTS)

    def slots(self, held: int) -> int:
        """Tokens that a row of so many reads at the most."""
        if self.read.unit == "tokens":
            return int(self.read.amount)
        return max(1, share(self.read.amount, held))
