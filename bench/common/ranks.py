"""Commands that several processes run together, of which the first one alone prints and writes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from kvpress.bench.common.models import Source

from kvpress import parallel


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Among how many processes the heads of the model are divided."""

    tp: Annotated[
        int | None,
        typer.Option(
            help="Processes that hold the model together: start as many, with torchrun"
            " --nproc-per-node N -m kvpress.",
            rich_help_panel="The model and where it runs",
            show_default="one",
            min=1,
        ),
    ] = None

    def divided(self, source: Source) -> Source:
        """The model in so many parts; where this is not the first process, it is silent from now.

        Raises BadParameter where others than that many were started, AttachError where none was.
        """
        if self.tp is None or self.tp == 1:
            refuse_idle_processes("Say what they are for: --tp, or --shards of kvpress eval.")
            return source
        device = "cpu" if source.on_cpu else "cuda"
        parallel.start(device)
        started = parallel.started()
        if started.size != self.tp:
            raise typer.BadParameter(
                f"--tp {self.tp}, but torchrun started {started.size} processes. Start as many:"
                f" torchrun --nproc-per-node {self.tp} -m kvpress ..."
            )
        silence_others()
        return replace(source, tp=self.tp, device=None)


def started_by_torchrun() -> bool:
    """Whether torchrun, or what does as it does, says which of its processes this is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def refuse_idle_processes(advice: str) -> None:
    """Raises BadParameter where several were started, each of which would do and write it all."""
    size = os.environ.get("WORLD_SIZE", "1")
    if started_by_torchrun() and size != "1":
        raise typer.BadParameter(
            f"torchrun started {size} processes, and each would do all of it. {advice}"
        )


def silence_others() -> None:
    """Nothing more is printed where this is not the first of the processes that were joined."""
    if not writes():
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def writes() -> bool:
    """Whether this process writes files: alone, or the first one."""
    return parallel.started().rank == 0
