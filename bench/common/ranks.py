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
            return source
        device = "cpu" if source.on_cpu else "cuda"
        parallel.start(device)
        started = parallel.started()
        if started.size != self.tp:
            raise typer.BadParameter(
                f"--tp {self.tp}, but torchrun started {started.size} processes. Start as many:"
                f" torchrun --nproc-per-node {self.tp} -m kvpress ..."
            )
        if started.rank:
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return replace(source, tp=self.tp, device=None)


def writes() -> bool:
    """Whether this process writes files: alone, or the first one."""
    return parallel.started().rank == 0
