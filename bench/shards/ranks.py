"""A run that the processes of torchrun share: each does every N-th unit, the first one writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from kvpress.bench.shards.beats import Beats
from kvpress.bench.shards.errors import ShardError
from kvpress.bench.shards.work import Found, Unit, Worker

from kvpress import parallel

_READY, _FOUND = "ready", "found"


class Shards:
    """This process and the others, from before their models are loaded until all are done.

    All of them get all results; what is to be done is what the first one says, which knows the
    file. Raises ShardError where another number of processes was started.
    """

    def __init__(self, make: Callable[[], Worker], size: int) -> None:
        parallel.start("cpu")  # they send each other plain values, whatever the models are on
        self._ranks = parallel.started()
        if self._ranks.size != size:
            raise ShardError(
                f"--shards {size}, but {self._ranks.size} processes were started. Start as many:"
                f" torchrun --nproc-per-node {size} -m kvpress ..."
            )
        self._make = make

    def __enter__(self) -> Shards:
        self._beats = Beats(self._ranks)
        try:
            with self._beats.interrupted():
                self._worker = self._make()
        except BaseException as error:
            self._beats.end(error)
            raise
        self.head, self.units = self._worker.head, self._worker.units
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._beats.end(error)

    def agreed(self, todo: Sequence[Unit]) -> Sequence[Unit]:
        """What the first process wants done. Raises ShardError where they were not asked the same.

        It waits until all have loaded their models.
        """
        asked = self.head.settings, self.units
        self._beats.say(_READY, (asked, todo))
        for _ in range(self._ranks.size):
            rank, _, (theirs, wanted) = self._beats.hear()
            if theirs != asked:
                raise ShardError(
                    f"{self._ranks} was asked for something else than process {rank}, or has other"
                    " files. Start all of them with the same command, model, text and version."
                )
            todo = wanted if rank == 0 else todo
        return todo

    def results(self, todo: Sequence[Unit]) -> Iterator[Found]:
        """What this process finds, and what the others say that they found."""
        for unit in todo[self._ranks.rank :: self._ranks.size]:
            done = self._worker.do(unit.number, unit.parts)
            for part in unit.parts:
                with self._beats.interrupted():
                    value = next(done)
                self._beats.say(_FOUND, Found(unit.number, part, value))
                yield from (message.value for message in self._beats.heard())
            done = iter(())  # what it holds is gone before the next unit begins
        while True:
            yield self._beats.hear().value


def use_own_gpu() -> None:
    """Makes the GPU with the number of this process on its node the one that `cuda` means.

    Raises ShardError where there are fewer GPUs than processes.
    """
    own, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= found:
        raise ShardError(
            f"Process {own} of this node has no GPU of its own: torch sees {found}. Start as many"
            " processes as there are GPUs, or give --device cpu."
        )
    torch.cuda.set_device(own)
