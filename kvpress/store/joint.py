"""What rows in several pools cost: their old parts, and their recent slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor

from kvpress.store.aging import PageAging
from kvpress.store.memory import PageMemory
from kvpress.store.trees import Trees


class JointMemory:
    """The memory of recent and old slots together, and of trees over old pages."""

    def __init__(self, aging: PageAging, trees: Trees) -> None:
        self._aging, self._trees = aging, trees

    @property
    def _all(self) -> list[PageMemory]:
        return [*(part.memory for part in self._aging.parts), self._aging.recent.memory]

    @property
    def lock(self) -> AbstractContextManager[None]:
        """To be held while the pages are used: forks may run in several threads."""
        return self._every()

    @contextmanager
    def _every(self) -> Iterator[None]:
        with ExitStack() as stack:
            for memory in self._all:  # always in this order
                stack.enter_context(memory.lock)
            yield

    @property
    def shares(self) -> bool:
        """Whether some page of these rows has other users."""
        return any(memory.shares for memory in self._all)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept alive: pages of both kinds, tables, counts and channels."""
        books = sum(tensor.nbytes for tensor in self._aging.decided.tensors())
        return books + self._trees.nbytes + sum(memory.nbytes for memory in self._all)

    @property
    def nbytes_shared(self) -> int:
        """Bytes of the pages that rows of other stores use as well."""
        return sum(memory.nbytes_shared for memory in self._all)

    @property
    def room(self) -> int:
        """Slots of the pages that these rows keep alive, empty ones and holes included."""
        return sum(memory.room for memory in self._all)

    def row_bytes(self) -> int:
        """Bytes of a row besides its pages."""
        return sum(memory.row_bytes() for memory in self._all)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is kept alive."""
        yield from self._aging.decided.tensors()
        yield from self._trees.tensors()
        for memory in self._all:
            yield from memory.tensors()

    def trim(self) -> None:
        """Gives memory back if much of the pools is unused."""
        for memory in self._all:
            memory.trim()

    def pages_of_sequences(self) -> list[list[int]]:
        """The counts and pages of all rows of each sequence; equal ones hold the same slots."""
        lists = [memory.pages_of_sequences() for memory in self._all]
        return [[x for part in parts for x in part] for parts in zip(*lists, strict=True)]
